"""Teachers and students from timm: building, weights in and out, evaluation.

Knows nothing of stores or training.
"""
