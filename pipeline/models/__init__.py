"""Teachers and students built with timm: their weights, adaptation to other resolutions, and evaluation.

Must not know about stores or training.
"""
