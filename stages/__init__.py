"""The pipeline's stages: one module each, started by its `run(config, ...)`."""
