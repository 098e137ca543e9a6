"""Augmented views: draw their parameters and render their pixels.

Pure functions of (recipe, sample key, view number); must not know about batches, models or stores.
"""
