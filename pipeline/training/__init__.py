"""The training loop and all that belongs to it: losses, optimizer, checkpoints, log.

Knows nothing of the command line or reports.
"""
