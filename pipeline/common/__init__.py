"""What every package may use: errors, files, locks, signals, ranks and random streams.

Must not know configurations, images or models.
"""
