"""The public Python interface: the pipeline's batches for a training loop of one's own.

What is public is imported from `pipeline` itself, see docs/python.md.
"""
