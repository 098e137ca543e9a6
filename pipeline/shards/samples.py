"""Find the samples of a shard: members grouped by key, images checked, labels read."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c

from pipeline.common.errors import PipelineError
from pipeline.shards.images import FORMATS, Undecodable, decode
from pipeline.shards.index_file import MAX_CLASSES, UNLABELLED
from pipeline.shards.tar import Member, Tar

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
BYTES_PER_PIXEL = 8  # of an image file at most: 16 bits of each of red, green, blue and alpha, uncompressed
MAX_JSON = 1 << 20  # bytes of a KEY.json


@dataclass(frozen=True)
class Labels:
    """Where the class number of a sample is."""

    key: str = ""
    """A field of KEY.json; empty: KEY.cls holds it."""
    optional: bool = False
    """A sample without a label, or with null or -1, is `UNLABELLED`; otherwise it is refused."""

    @property
    def member(self) -> str:
        return "json" if self.key else "cls"

    def parse(self, data: bytes) -> int | None:
        """The class number in a member's bytes: UNLABELLED if it says that there is none, None if it is invalid."""
        if not self.key:
            text = data.strip()
            return UNLABELLED if text == b"-1" else _class_number(text)
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return None
        value = content.get(self.key) if isinstance(content, dict) else ""
        if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
            value = None if math.isnan(value) else int(value)
        if value is None or value == UNLABELLED:
            return UNLABELLED
        return None if isinstance(value, bool) else _class_number(str(value).encode())


def _class_number(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) < 6 and int(text) < MAX_CLASSES else None


@dataclass
class Image:
    """Where an image is stored and its checksum, or why it does not decode."""

    offset: int
    size: int
    crc32c: int = 0
    digest: bytes = b""
    """BLAKE2b of its bytes."""
    refused: str = ""


Fields = dict[str, Image | int | None]
"""A sample by extension: its image, its class (None if that is not a number), None for anything else."""


def read_samples(
    tar: Tar, max_pixels: int, source_formats: tuple[str, ...], labels: Labels
) -> Iterator[tuple[str, Fields]]:
    """Yield (key, fields) in tar order, with members grouped as webdataset groups them."""
    last, fields = None, {}
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue  # README, ._x.jpg: webdataset does not take them for samples either
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        if key != last or extension in fields:
            if last is not None:
                yield last, fields
            last, fields = key, {}
        fields[extension] = None
        if extension in IMAGE_TYPES:
            fields[extension] = _check_image(tar, member, max_pixels, source_formats)
        elif extension == labels.member and member.size < (MAX_JSON if labels.key else 64):
            fields[extension] = labels.parse(tar.read(member.size))
    if last is not None:
        yield last, fields


def _check_image(tar: Tar, member: Member, max_pixels: int, source_formats: tuple[str, ...]) -> Image:
    if member.size > min(2**31 - 1, BYTES_PER_PIXEL * max_pixels + 2**20):
        refused = f"{member.size:,} bytes: more than an image of {max_pixels:,} pixels (data.max_pixels) can have"
        return Image(member.offset, member.size, refused=refused)
    data = tar.read(member.size)
    try:
        decode(data, max_pixels)
    except Undecodable as error:
        return Image(member.offset, member.size, refused=_refusal(data, max_pixels, source_formats) or str(error))
    return Image(member.offset, member.size, google_crc32c.value(data), hashlib.blake2b(data, digest_size=16).digest())


def _refusal(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> str:
    """Why an image of one of the formats does not decode; empty if it does, or if shards hold no other formats."""
    if formats != FORMATS:
        try:
            decode(data, max_pixels, formats)
        except Undecodable as error:
            return str(error)
    return ""


def sample_row(
    where: str, key: str, fields: Fields, duplicate: bool, labels: Labels
) -> tuple[tuple[bytes, int, int, int, int], bytes] | str:
    """A sample's row and the digest of its image, or why the image was refused.

    Raises:
        PipelineError: it is not one image and one label, or another sample has its key.
    """
    images = [value for value in fields.values() if isinstance(value, Image)]
    label: Any = fields.get(labels.member, UNLABELLED if labels.optional else None)
    unlabelled = not labels.optional and (label == UNLABELLED or labels.member not in fields)
    if len(images) != 1 or not isinstance(label, int) or unlabelled or duplicate:
        field = f" as {labels.key!r} (data.label_key)" if labels.key else ""
        raise PipelineError(
            f"{where}: sample {key!r}",
            expected=f"one image ({', '.join(IMAGE_TYPES)}), a .{labels.member} with a class number{field}, a unique key",
            found="a duplicate key" if duplicate else f"members {sorted(fields)}, class {label}",
            do="repair the shard" + "; or for training images without labels, set data.unlabelled" * unlabelled,
        )
    image = images[0]
    return image.refused or ((key.encode(), image.offset, image.size, label, image.crc32c), image.digest)
