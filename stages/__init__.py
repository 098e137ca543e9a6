"""The pipeline's stages: one module each, `run(config, ...)` and no more."""
