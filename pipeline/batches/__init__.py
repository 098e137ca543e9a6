"""Batches of views: which (group, view) a step holds, groups rendered and mixed, and the loader.

Knows nothing of models, teachers or stores.
"""
