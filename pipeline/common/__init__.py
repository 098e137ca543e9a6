"""What every package may use: errors, files, locks, signals, ranks and random streams.

Must not know about configurations, images or models.
"""
