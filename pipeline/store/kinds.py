"""The kinds of predictions that a store can hold.

The argmax, uint16, is that of the unrounded logits and is stored with every kind. All kinds but `argmax` have an array
of their own; its row for a sample, in one view, is the payload.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

NO_CLASS = 65535  # uint16


@dataclass(frozen=True)
class Kind:
    """What the store keeps of a view besides the argmax."""

    kept: str
    """Description, with the distillation that it suffices for."""
    distillation: str
    """That distillation in short, for tables."""
    width: Callable[[int, int], int]
    """Numbers per row for so many classes and k; with fewer classes than k, topk stores all of them."""
    dtype: type[Any]
    """A scalar type of numpy."""
    fill: float
    """The value of numbers that were never written."""
    axis: str
    """Name of the last dimension of its array."""
    has_logits: bool = False
    """Whether it gives the teacher's logits, or nearly so."""
    sharded: bool = False
    """Whether a few views are read at a time; the other kinds are read a block at a time."""


# in the order of their checksums in the array `check`
KINDS = {
    "argmax": Kind(
        "the class with the largest logit: for hard distillation", "hard",
        lambda classes, k: 0, np.uint16, NO_CLASS, "class",
    ),
    # k classes, the bits of their float16 logits, and those of the float32 log-sum-exp of the others
    "topk": Kind(
        "the largest logits and the log-sum-exp of the others: for hard and soft distillation", "hard, soft",
        lambda classes, k: 2 * min(k, classes) + 2, np.uint16, NO_CLASS, "packed", has_logits=True,
    ),
    "dense": Kind(
        "every logit as float16: for hard and soft distillation", "hard, soft",
        lambda classes, k: classes, np.float16, np.nan, "class", has_logits=True, sharded=True,
    ),
    # the levels, then the smallest and the largest logit as float32
    "dense8": Kind(
        "every logit in 256 steps between the view's smallest and largest: for hard and soft distillation", "hard, soft",
        lambda classes, k: classes + 8, np.uint8, 255, "class", has_logits=True, sharded=True,
    ),
    "sampled": Kind(
        "classes drawn from the softmax at a temperature: for hard distillation, and soft at this temperature",
        "hard, soft at one tau", lambda classes, k: k, np.uint16, NO_CLASS, "sample",
    ),
}  # fmt: skip


def payload_width(kind: str, classes: int, k: int) -> int:
    """Numbers per row of a kind's own array, 0 for argmax."""
    return KINDS[kind].width(classes, k)


def classes_per_row(kind: str, width: int) -> int:
    """The k of a payload of topk or sampled; 1 for the other kinds, whose width does not depend on it."""
    return {"topk": (width - 2) // 2, "sampled": width}.get(kind, 1)


def row_bytes(kind: str, classes: int, k: int) -> int:
    """Bytes per row and view: the argmax and the payload."""
    return 2 + payload_width(kind, classes, k) * np.dtype(KINDS[kind].dtype).itemsize
