"""Data sets as WebDataset shards with an index: where images come from, how they are written, read and decoded.

Knows nothing of augmentation.
"""
