"""What every package may use: errors, files, locks, signals, ranks and random streams.

Knows nothing of configurations, images or models.
"""
