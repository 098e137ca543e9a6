"""The training loop: identity of a run, the teacher's predictions, losses, optimizer, checkpoints, log, publishing.

Knows nothing of the command line or reports.
"""
