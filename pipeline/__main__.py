"""`python -m pipeline`, for torchrun."""

from pipeline.cli import main

main()
