"""The typed configuration: every key, its validation, and what follows from it: paths, the stores needed, fingerprints.

Must not know about torch, images or the contents of any file other than configurations.
"""
