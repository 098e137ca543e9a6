"""Choose validation images where a data set has none of its own: a stratified, seeded split."""

import hashlib
import math
import os


def chosen_for_validation(names: list[str], labels: list[int], seed: int, fraction: float) -> set[str]:
    """Choose a fraction of each class, by the smallest hashes of (seed, name).

    A class of n images has n * fraction of them in validation, rounded half up, but at least one in both splits if it
    has two; a class of one image has it in training. The order of `names` does not matter. An image that is added to a
    class moves at most one other image of that class, and none of other classes.
    """
    by_class: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        by_class.setdefault(label, []).append(name)
    chosen: set[str] = set()
    for members in by_class.values():
        quota = min(max(math.floor(len(members) * fraction + 0.5), 1), len(members) - 1)
        chosen.update(sorted(members, key=lambda name: (_rank(seed, name), name))[:quota])
    return chosen


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\x1fvalidation\x1f".encode() + os.fsencode(name), digest_size=16).digest()
