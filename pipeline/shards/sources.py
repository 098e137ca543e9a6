"""Where images come from: what samples there are, and one sample's bytes."""

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

from pipeline.common.errors import IO_ERRORS, PipelineError, UsageError, reason
from pipeline.common.files import StatSignature, stat_signature
from pipeline.config.schema import Data
from pipeline.shards.contents import digest
from pipeline.shards.images import FORMATS, Undecodable, opened, rgb

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats, by Pillow's names, that shards hold as they are, and their extension there."""
FOLDER_FORMATS = (*FORMATS, "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", *(["AVIF"] if features.check("avif") else []))
"""Those that a folder's images may have; no others are tried, whatever a file is called."""
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
"""What makes a picture upright, by its EXIF orientation."""
MAX_SHARDS = 1_000_000
DIGITS_SIZE = 32  # pixels a side that the 8 x 8 digits are stored at
DIGITS_VAL = 5  # every fifth of a shuffled class is for validation


@dataclass(frozen=True)
class Listing:
    """A split's samples, in an order that depends on their names alone."""

    classes: list[str]
    names: list[str]
    """Path below the split's folder (folder), or the sample's number (digits)."""
    labels: list[int]
    stamps: list[StatSignature]
    """Of each file; empty for digits."""
    left_out: list[str]
    """Files beside them that are taken for no images, and links to folders."""


def list_split(data: Data, split: str) -> Listing:
    """What a split (train or val) holds.

    Raises:
        UsageError: the folder is not named or not there.
        PipelineError: no classes, no images, or an empty file.
    """
    return _list_digits(split) if data.source == "digits" else _list_folder(data, split)


def split_folder(data: Data, split: str) -> Path:
    return Path(getattr(data, split)).expanduser()


def load_sample(data: Data, split: str, name: str, held: str) -> tuple[str, bytes]:
    """A sample's image type (jpg, png, webp) and encoded bytes.

    Args:
        held: the digest that its file had; empty for digits.

    Raises:
        PipelineError: the file is gone or changed.
    """
    if data.source == "digits":
        return "png", _digit_png(int(name))
    path = split_folder(data, split) / name
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
    return _stored(image, data) or (NATIVE.get(path.suffix[1:].lower(), "png"), image)


def _stored(image: bytes, data: Data) -> tuple[str, bytes] | None:
    """Type and bytes as shards hold an image: as it is if every reader of shards knows its format, else as a PNG.

    None if it does not decode; indexing then says so.
    """
    try:
        with opened(image, data.max_pixels, FOLDER_FORMATS) as picture:
            if picture.format not in STORED:
                picture.load()  # which turns a TIFF upright, and takes its mark away
            # Pillow decodes a PNG in full to look for a mark that few have
            marked = data.exif_orientation and (picture.format != "PNG" or b"eXIf" in image)
            turn = TURNS.get(picture.getexif().get(ORIENTATION, 1)) if marked else None
            if picture.format in STORED and turn is None:
                return STORED[picture.format], image
            pixels = Image.fromarray(rgb(picture))
    except Undecodable:
        return None
    buffer = io.BytesIO()
    (pixels if turn is None else pixels.transpose(turn)).save(buffer, "png")
    return "png", buffer.getvalue()


def expand(key: str, pattern: str) -> list[str]:
    """The shards that a key names: braces {0000..1023} and wildcards *, ?, [] expanded, `~` too; sorted by wildcard.

    Raises:
        UsageError: nothing matches, or the braces are not balanced or mean too many.
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
    except IO_ERRORS as error:
        raise PipelineError(f"{pattern}: cannot be listed", found=reason(error), do="name the shards") from error


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

    bunch: Any = load_digits()
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
        left_out=[],
    )


def _digit_png(number: int) -> bytes:
    images, _ = _digits()
    picture = Image.fromarray((images[number] / 16 * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    picture.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()


def _list_folder(data: Data, split: str) -> Listing:
    root = split_folder(data, split)
    if not getattr(data, split) or not root.is_dir():
        raise UsageError(
            f"data.{split}: {str(root)!r}" if getattr(data, split) else f"data.{split}",
            expected="a folder that holds one folder of images a class",
            found="no such folder" if getattr(data, split) else "nothing: the key is empty",
            do=f"set data.{split} in params.yaml, or --set data.{split}=FOLDER; to go on with what was prepared of"
            " images that are gone: dvc freeze prepare",
        )
    entries = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    classes = [name for name in entries if (root / name).is_dir()]
    names, labels, stamps = [], [], []
    left_out = [name for name in entries if name not in set(classes)]
    for label, name in enumerate(classes):
        images: list[tuple[str, StatSignature]] = []
        others: list[str] = []
        _look_below(root, name, images, others)
        images.sort(key=lambda image: image[0].split("/"))
        left_out += sorted(others)
        if not images:
            raise PipelineError(
                f"{root / name}: a class without images",
                expected=f"at least one file of {', '.join(sorted(EXTENSIONS))}",
                found=kinds(others) or "none",
                do="add images, or convert what is there, or remove the folder",
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
    return Listing(classes, names, labels, stamps, left_out)


def _look_below(root: Path, below: str, images: list[tuple[str, StatSignature]], others: list[str]) -> None:
    """Add the images below a folder of `root` (path from there, and stamp), and what else is there but hidden files."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}"
            if entry.name.startswith("."):
                continue  # .DS_Store, ._001.jpg
            if entry.is_dir(follow_symlinks=False):
                _look_below(root, name, images, others)
            elif extension(entry.name) in EXTENSIONS and entry.is_file():
                images.append((name, stat_signature(entry.stat())))
            else:
                others.append(name)


def extension(name: str) -> str:
    """Lower case, without its dot; empty if there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def kinds(names: list[str]) -> str:
    """How many files of each extension there are, and an example: `12 .heic (cat/IMG_1.heic), 1 .txt (cat/a.txt)`."""
    examples: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in names:
        kind = f".{extension(name)}" if extension(name) else "without an extension"
        counts[kind] = counts.get(kind, 0) + 1
        examples.setdefault(kind, name)
    commonest = sorted(counts, key=lambda kind: -counts[kind])
    return ", ".join(f"{counts[kind]:,} {kind} ({examples[kind]})" for kind in commonest)
