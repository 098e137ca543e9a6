"""The typed configuration: every key, its validation, and what follows from it (paths, stores wanted, fingerprints).

Knows nothing of torch, images or stores' contents.
"""
