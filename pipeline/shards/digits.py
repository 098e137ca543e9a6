"""The handwritten digits that are bundled with scikit-learn."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from pipeline.shards.listing import Listing

DIGITS_SIZE = 32  # pixels per side that the 8 x 8 digits are stored at
DIGITS_VAL = 5  # every fifth image of a class is for validation


@lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes a second to import

    bunch: Any = load_digits()
    return bunch.images, bunch.target


def list_digits(split: str) -> Listing:
    """List the digits of a split by their numbers."""
    _, target = _digits()
    # positions within each class: both splits have the same shares of classes
    within = np.array([(target[:i] == label).sum() for i, label in enumerate(target)])
    chosen = np.flatnonzero((within % DIGITS_VAL == 0) == (split == "val"))
    return Listing(
        classes=[str(digit) for digit in range(10)],
        names=[f"{i:04d}" for i in chosen],
        labels=[int(target[i]) for i in chosen],
        signatures=[],
        ignored=[],
    )


def digit_png(number: int) -> bytes:
    """A digit as a PNG of DIGITS_SIZE pixels per side."""
    images, _ = _digits()
    image = Image.fromarray((images[number] / 16 * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    image.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()
