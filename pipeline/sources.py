"""Where images come from: what samples there are, and one sample's bytes."""

import hashlib
import io
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import Data
from pipeline.errors import PipelineError, UsageError
from pipeline.shards import IMAGE_TYPES

DIGITS_SIZE = 32  # pixels a side that the 8 x 8 digits are stored at
DIGITS_VAL = 5  # every fifth of a shuffled class is for validation


@dataclass(frozen=True)
class Listing:
    """A split's samples, in an order that depends on their names alone."""

    classes: list[str]
    names: list[str]
    """Path below the split's folder (folder), or the sample's number (digits)."""
    labels: list[int]
    sizes: list[int]
    """Bytes of each file, so that a changed folder is another listing."""


def list_split(data: Data, split: str) -> Listing:
    """What a split (train or val) holds.

    Raises:
        UsageError: the folder is not named or not there.
        PipelineError: no classes, no images, or an empty file.
    """
    return _list_digits(split) if data.source == "digits" else _list_folder(data, split)


def load_sample(data: Data, split: str, name: str) -> tuple[str, bytes]:
    """A sample's image type (jpg, png, webp) and encoded bytes."""
    if data.source == "digits":
        return "png", _digit_png(int(name))
    path = Path(getattr(data, split)) / name
    try:
        return path.suffix[1:].lower(), path.read_bytes()
    except OSError as error:
        raise PipelineError(
            f"{path}: the image cannot be read",
            found=error.strerror or str(error),
            do="restore it or correct its permissions, then run prepare again",
        ) from error


def sample_keys(names: list[str]) -> list[str]:
    """A key for each name: its path without extension, in [A-Za-z0-9_/-], unique.

    A dot would end a WebDataset key, so other characters become `_`; where two names then agree,
    each gets a hash of its name, so a key depends on its own name and the set, not on the order.
    """
    keys = [re.sub(r"[^A-Za-z0-9_/-]", "_", name.rpartition(".")[0] or name) for name in names]
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return [
        key if counts[key] == 1 else f"{key}_{hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()}"
        for key, name in zip(keys, names, strict=True)
    ]


@lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import (
        load_digits,  # a second to import, needed for this source only
    )

    bunch = load_digits()
    return bunch.images, bunch.target


def _list_digits(split: str) -> Listing:
    _, target = _digits()
    # positions within each class, so both splits hold every class alike
    within = np.array([(target[:i] == label).sum() for i, label in enumerate(target)])
    chosen = np.flatnonzero((within % DIGITS_VAL == 0) == (split == "val"))
    return Listing(
        classes=[str(digit) for digit in range(10)],
        names=[f"{i:04d}" for i in chosen],
        labels=[int(target[i]) for i in chosen],
        sizes=[0] * len(chosen),
    )


def _digit_png(number: int) -> bytes:
    images, _ = _digits()
    picture = Image.fromarray((images[number] / 16 * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    picture.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()


def _list_folder(data: Data, split: str) -> Listing:
    root = Path(getattr(data, split))
    if not getattr(data, split) or not root.is_dir():
        raise UsageError(
            f"data.{split}: {str(root)!r}",
            expected="a folder that holds one folder of images a class",
            found="no such folder" if getattr(data, split) else "nothing: the key is empty",
            do=f"set data.{split} in params.yaml, or --set data.{split}=FOLDER",
        )
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    names, labels, sizes = [], [], []
    for label, name in enumerate(classes):
        files = sorted(
            path for path in (root / name).rglob("*") if path.suffix[1:].lower() in IMAGE_TYPES and path.is_file()
        )
        if not files:
            raise PipelineError(
                f"{root / name}: a class without images",
                expected=f"at least one file of {', '.join(IMAGE_TYPES)}",
                found="none",
                do="add images or remove the folder",
            )
        for path in files[: data.max_per_class]:
            names.append(path.relative_to(root).as_posix())
            labels.append(label)
            sizes.append(path.stat().st_size)
    if not classes:
        raise PipelineError(
            f"{root}: no classes",
            expected="one folder of images a class, for example cat/001.jpg",
            found="no folder in it",
            do=f"point data.{split} at the folder that holds the class folders",
        )
    return Listing(classes, names, labels, sizes)
