"""The public Python interface: the pipeline's batches for a custom training loop.

What is public is imported from `pipeline` itself, see docs/python.md.
"""
