"""Augmented views: draw their parameters, render their pixels.

Pure functions of (recipe, sample key, view number); knows nothing of batches, models or stores.
"""
