"""`python -m pipeline`, for torchrun."""

from pipeline.cli.main import main

main()
