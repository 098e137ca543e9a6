"""Where images come from: what samples there are, and one sample's bytes."""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import Data
from pipeline.contents import digest
from pipeline.errors import PipelineError, UsageError, reason
from pipeline.files import Stamp, stamp
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
    stamps: list[Stamp]
    """Of each file; empty for digits."""


def list_split(data: Data, split: str) -> Listing:
    """What a split (train or val) holds.

    Raises:
        UsageError: the folder is not named or not there.
        PipelineError: no classes, no images, or an empty file.
    """
    return _list_digits(split) if data.source == "digits" else _list_folder(data, split)


def load_sample(data: Data, split: str, name: str, held: str) -> tuple[str, bytes]:
    """A sample's image type (jpg, png, webp) and encoded bytes.

    Args:
        held: the digest that its file had; empty for digits.

    Raises:
        PipelineError: the file is gone or changed.
    """
    if data.source == "digits":
        return "png", _digit_png(int(name))
    path = Path(getattr(data, split)) / name
    try:
        image = path.read_bytes()
    except OSError as error:
        raise PipelineError(
            f"{path}: the image cannot be read",
            found=reason(error),
            do="restore it or correct its permissions, then run prepare again",
        ) from error
    if digest(image) != held:
        raise PipelineError(
            f"{path}: the image",
            expected="what it was when prepare began",
            found="it changed meanwhile, or it was replaced with its times kept",
            do="run: pipeline prepare",
        )
    return path.suffix[1:].lower(), image


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
        stamps=[],
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
    names, labels, stamps = [], [], []
    for label, name in enumerate(classes):
        images = sorted(_images(root, name), key=lambda image: image[0].split("/"))
        if not images:
            raise PipelineError(
                f"{root / name}: a class without images",
                expected=f"at least one file of {', '.join(IMAGE_TYPES)}",
                found="none",
                do="add images or remove the folder",
            )
        for image, stamped in images[: data.max_per_class]:
            names.append(image)
            labels.append(label)
            stamps.append(stamped)
    if not classes:
        raise PipelineError(
            f"{root}: no classes",
            expected="one folder of images a class, for example cat/001.jpg",
            found="no folder in it",
            do=f"point data.{split} at the folder that holds the class folders",
        )
    return Listing(classes, names, labels, stamps)


def _images(root: Path, below: str) -> Iterator[tuple[str, Stamp]]:
    """The images below a folder of `root`: path from there, and stamp."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _images(root, name)
            elif entry.name.rpartition(".")[2].lower() in IMAGE_TYPES and entry.is_file():
                yield name, stamp(entry.stat())
