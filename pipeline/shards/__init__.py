"""Data sets as WebDataset shards with an index: list images, plan, write, index, read and decode them.

Must not know about augmentation.
"""
