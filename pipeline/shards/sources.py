"""Where images come from: list a split's samples, load one sample, expand patterns of shards."""

import glob
import hashlib
import io
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from braceexpand import braceexpand
from PIL import Image, features

from pipeline.common.errors import PipelineError, UsageError, is_io_error, reason
from pipeline.common.files import StatSignature, stat_signature
from pipeline.config.schema import Data
from pipeline.shards.contents import digest, unreadable_image
from pipeline.shards.images import FORMATS, Undecodable, open_image, to_rgb

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's formats that shards store unchanged, and their extension there."""
FOLDER_FORMATS = (*FORMATS, "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", *(["AVIF"] if features.check("avif") else []))
"""Pillow's formats that a folder's images may have; no others are tried, whatever a file is called."""
NATIVE = dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "jpg") | {"png": "png", "webp": "webp"}
EXTENSIONS = {*NATIVE, "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k"} | (
    {"avif"} if "AVIF" in FOLDER_FORMATS else set()
)
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by its EXIF orientation."""
MAX_SHARDS = 1_000_000
DIGITS_SIZE = 32  # pixels per side that the 8 x 8 digits are stored at
DIGITS_VAL = 5  # every fifth image of a class is for validation


@dataclass(frozen=True)
class Listing:
    """A split's samples, in an order that depends only on their names."""

    classes: list[str]
    names: list[str]
    """Path below the split's folder (folder), or the sample's number (digits)."""
    labels: list[int]
    signatures: list[StatSignature]
    """Of each file; empty for digits."""
    ignored: list[str]
    """Other files, which are not taken for images, and links to folders."""


def list_split(data: Data, split: str) -> Listing:
    """List the samples of a split (train or val).

    Raises:
        UsageError: the folder is not configured or missing.
        PipelineError: no classes, no images, or an empty file.
    """
    return _list_digits(split) if data.source == "digits" else _list_folder(data, split)


def split_folder(data: Data, split: str) -> Path:
    return Path(getattr(data, split)).expanduser()


def load_sample(data: Data, split: str, name: str, expected: str) -> tuple[str, bytes]:
    """A sample's image type (jpg, png, webp) and encoded bytes, as shards store them.

    Args:
        expected: digest of its file; empty for digits.

    Raises:
        PipelineError: the file is gone or changed.
    """
    if data.source == "digits":
        return "png", _digit_png(int(name))
    path = split_folder(data, split) / name
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise unreadable_image(path, error) from error
    if digest(encoded) != expected:
        raise PipelineError(
            f"{path}: the image",
            expected="the bytes that it had when prepare started",
            found="others: it changed meanwhile, or it was replaced keeping its times",
            do="run: pipeline prepare",
        )
    return _stored(encoded, data) or (NATIVE.get(path.suffix[1:].lower(), "png"), encoded)


def _stored(encoded: bytes, data: Data) -> tuple[str, bytes] | None:
    """Type and bytes of an image in a shard: unchanged if every reader of shards knows its format, else as a PNG.

    None if it does not decode; indexing will report that.
    """
    try:
        with open_image(encoded, data.max_pixels, FOLDER_FORMATS) as image:
            if image.format not in STORED:
                image.load()  # turns a TIFF upright and drops its orientation tag
            # Pillow decodes a PNG completely to look for a tag that few have
            tagged = data.exif_orientation and (image.format != "PNG" or b"eXIf" in encoded)
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1)) if tagged else None
            if image.format in STORED and turn is None:
                return STORED[image.format], encoded
            pixels = Image.fromarray(to_rgb(image))
    except Undecodable:
        return None
    buffer = io.BytesIO()
    (pixels if turn is None else pixels.transpose(turn)).save(buffer, "png")
    return "png", buffer.getvalue()


def expand(key: str, pattern: str) -> list[str]:
    """Expand braces {0000..1023}, wildcards *, ?, [] (their matches sorted) and `~` in a pattern of shards.

    Args:
        key: the configuration key of the pattern, for messages.

    Raises:
        UsageError: nothing matches, or the braces are unbalanced or expand to too many.
    """
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    try:
        # expanding makes a list of each range at once
        if any(abs(int(last) - int(first)) > MAX_SHARDS for first, last in ranges):
            raise ValueError(f"a range of more than {MAX_SHARDS:,}")
        named = list(islice(braceexpand(os.path.expanduser(pattern)), MAX_SHARDS + 1))
    except ValueError as error:
        raise UsageError(f"{key}: {pattern}", found=str(error), do="correct the braces") from None
    if len(named) > MAX_SHARDS:
        raise UsageError(f"{key}: {pattern}", expected=f"at most {MAX_SHARDS:,} shards", do="correct the braces")
    paths: list[str] = []
    for path in named:
        found = _matching(path) if set("*?[") & set(path.partition("://")[2] or path) else [path]
        if not found:
            raise UsageError(
                f"{key}: {path}", expected="names of shards", found="no file that matches", do=f"correct {key}"
            )
        paths += found
    return paths


def _matching(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(pattern))
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return sorted(filesystem.unstrip_protocol(found) for found in filesystem.glob(path))
    except Exception as error:
        if not is_io_error(error):
            raise
        raise PipelineError(f"{pattern}: cannot be listed", found=reason(error), do="name the shards") from error


def sample_keys(names: list[str]) -> list[str]:
    """A key for each name: its path without extension, in [A-Za-z0-9_/-], unique.

    A dot would end a WebDataset key, so other characters become `_`. Names that would then get the same key each get a
    hash of the name appended: a key depends on its own name and the set of names, not on their order.
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

    bunch: Any = load_digits()
    return bunch.images, bunch.target


def _list_digits(split: str) -> Listing:
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


def _digit_png(number: int) -> bytes:
    images, _ = _digits()
    image = Image.fromarray((images[number] / 16 * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    image.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()


def _list_folder(data: Data, split: str) -> Listing:
    root = split_folder(data, split)
    if not getattr(data, split) or not root.is_dir():
        raise UsageError(
            f"data.{split}: {str(root)!r}" if getattr(data, split) else f"data.{split}",
            expected="a folder with one folder of images per class",
            found="no such folder" if getattr(data, split) else "nothing: the key is empty",
            do=f"set data.{split} in params.yaml, or --set data.{split}=FOLDER; to continue with shards prepared"
            " from images that are gone: dvc freeze prepare",
        )
    entries = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    classes = [name for name in entries if (root / name).is_dir()]
    names, labels, signatures = [], [], []
    ignored = [name for name in entries if name not in set(classes)]
    for label, name in enumerate(classes):
        images: list[tuple[str, StatSignature]] = []
        others: list[str] = []
        _scan(root, name, images, others)
        images.sort(key=lambda image: image[0].split("/"))
        ignored += sorted(others)
        if not images:
            raise PipelineError(
                f"{root / name}: a class without images",
                expected=f"at least one file of {', '.join(sorted(EXTENSIONS))}",
                found=count_by_extension(others) or "none",
                do="add images, or convert what is there, or remove the folder",
            )
        for image, signature in images[: data.max_per_class]:
            names.append(image)
            labels.append(label)
            signatures.append(signature)
    if not classes:
        raise PipelineError(
            f"{root}: no classes",
            expected="one folder of images per class, for example cat/001.jpg",
            found="no folder in it",
            do=f"point data.{split} at the folder that holds the class folders",
        )
    return Listing(classes, names, labels, signatures, ignored)


def _scan(root: Path, below: str, images: list[tuple[str, StatSignature]], others: list[str]) -> None:
    """Add what is below a folder of `root` to `images` (path, signature) and `others` (path); skip hidden files."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}"
            if entry.name.startswith("."):
                continue  # .DS_Store, ._001.jpg
            if entry.is_dir(follow_symlinks=False):
                _scan(root, name, images, others)
            elif extension(entry.name) in EXTENSIONS and entry.is_file():
                images.append((name, stat_signature(entry.stat())))
            else:
                others.append(name)


def extension(name: str) -> str:
    """A name's extension in lower case, without the dot; empty if there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def count_by_extension(names: list[str]) -> str:
    """Count files per extension, with an example each: `12 .heic (cat/IMG_1.heic), 1 .txt (cat/a.txt)`."""
    examples: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in names:
        label = f".{extension(name)}" if extension(name) else "without an extension"
        counts[label] = counts.get(label, 0) + 1
        examples.setdefault(label, name)
    commonest = sorted(counts, key=lambda label: -counts[label])
    return ", ".join(f"{counts[label]:,} {label} ({examples[label]})" for label in commonest)
