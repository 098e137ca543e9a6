"""Write shards and their index.

A shard is a tar of `KEY.jpg` (png, webp) and `KEY.cls`; a damaged or missing one is refused.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import google_crc32c
import numpy as np
from webdataset.writer import TarWriter

from pipeline.common.errors import IO_ERRORS, PipelineError, reason
from pipeline.common.files import atomic_write, is_conclusive, stat_signature
from pipeline.config.validation import fingerprint
from pipeline.shards.images import MAX_PIXELS, Undecodable, decode
from pipeline.shards.index import FORMAT, MAX_CLASSES, Index, ShardIndex, row_type
from pipeline.shards.tar import Damaged, Member, Tar

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
BYTES_PER_PIXEL = 8  # of an image's file at most: 16 bits of each of red, green, blue and alpha, not compressed
VERSIONS = ("ETag", "LastModified", "Last-Modified", "Content-MD5", "last_modified", "updated", "mtime", "created")
"""What file systems behind URLs tell of a file besides its size, by their names for it."""


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, int]]) -> None:
    """One tar of (key, image type, image bytes, label), whole or not at all; same input, same bytes."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file, TarWriter(file, mtime=0) as tar:
        for key, image_type, image, label in samples:
            tar.write({"__key__": key, image_type: image, "cls": str(label)})


def index_shard(location: str, name: str, max_pixels: int = MAX_PIXELS) -> ShardIndex:
    """Read a shard once: find every sample, decode its image strictly, hash its bytes.

    Args:
        max_pixels: an image of more is refused before it is decoded.

    Raises:
        PipelineError: no such shard, damaged tar, a sample without label or image, a key twice.
    """
    where = f"{location}/{name}"
    rows: list[tuple[bytes, int, int, int, int]] = []
    refused: list[dict[str, str]] = []
    seen: set[str] = set()
    try:
        with fsspec.open(where, "rb") as file:
            tar = Tar(cast(BinaryIO, file))
            for key, parts in _samples(tar, max_pixels):
                row = _row(where, key, parts, key in seen)
                seen.add(key)
                if isinstance(row, str):
                    refused.append({"shard": name, "key": key, "reason": row})
                else:
                    rows.append(row)
    except (*IO_ERRORS, Damaged) as error:
        raise _unreadable(where, error) from error
    length = max((len(row[0]) for row in rows), default=1)
    return ShardIndex(name, np.array(rows, row_type(length)), tar.bytes, tar.sha256.hexdigest(), refused)


@dataclass
class _Image:
    """Where it lies and its checksum, or why it does not decode."""

    offset: int
    size: int
    crc32c: int = 0
    refused: str = ""


_Parts = dict[str, _Image | int | None]
"""Of a sample, by extension: its image, its class (None if it is no number), anything else as None."""


def _samples(tar: Tar, max_pixels: int) -> Iterator[tuple[str, _Parts]]:
    """(key, parts) in tar order, as webdataset groups members."""
    last, parts = None, {}
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue  # README, ._x.jpg: no sample to webdataset either
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        if key != last or extension in parts:
            if last is not None:
                yield last, parts
            last, parts = key, {}
        parts[extension] = None
        if extension in IMAGE_TYPES:
            parts[extension] = _look(tar, member, max_pixels)
        elif extension == "cls" and member.size < 64:
            text = tar.read(member.size).strip()
            parts[extension] = int(text) if text.isdigit() and len(text) < 6 and int(text) < MAX_CLASSES else None
    if last is not None:
        yield last, parts


def _look(tar: Tar, member: Member, max_pixels: int) -> _Image:
    if member.size > min(2**31 - 1, BYTES_PER_PIXEL * max_pixels + 2**20):
        reason = f"{member.size:,} bytes: more than an image of {max_pixels:,} pixels (data.max_pixels) can have"
        return _Image(member.offset, member.size, refused=reason)
    data = tar.read(member.size)
    try:
        decode(data, max_pixels)
    except Undecodable as error:
        return _Image(member.offset, member.size, refused=str(error))
    return _Image(member.offset, member.size, google_crc32c.value(data))


def _row(where: str, key: str, parts: _Parts, twice: bool) -> tuple[bytes, int, int, int, int] | str:
    """A sample's row, or why its image was refused."""
    images = [part for part in parts.values() if isinstance(part, _Image)]
    label = parts.get("cls")
    if len(images) != 1 or not isinstance(label, int) or twice:
        raise PipelineError(
            f"{where}: sample {key!r}",
            expected=f"one image ({', '.join(IMAGE_TYPES)}), a .cls with a class number, a key that stands once",
            found="the key stands twice" if twice else f"members {sorted(parts)}, class {label}",
            do="mend the shard",
        )
    image = images[0]
    return image.refused or (key.encode(), image.offset, image.size, label, image.crc32c)


def shard_stamp(location: str, name: str) -> Any:
    """A JSON value that is another when the shard is; None where nothing but its contents would tell.

    Raises:
        PipelineError: no such shard, or no answer.
    """
    where, now = f"{location}/{name}", time.time()
    try:
        if "://" not in where:
            found = stat_signature(os.stat(where))
            return [*found] if is_conclusive(found, now) else None
        filesystem, path = fsspec.core.url_to_fs(where)
        filesystem.invalidate_cache()
        about = filesystem.info(path)
    except IO_ERRORS as error:
        raise _unreadable(where, error) from error
    versions = {key: str(about[key]) for key in VERSIONS if about.get(key) is not None}
    return [about.get("size"), versions] if versions else None


def _unreadable(where: str, error: Exception) -> PipelineError:
    return PipelineError(
        f"{where}: the shard cannot be read",
        expected="a tar of KEY.jpg (png, webp) and KEY.cls members",
        found=reason(error),
        do="correct its name or restore it; if prepare wrote it, remove it and run: pipeline prepare",
    )


def write_index(
    path: Path, location: str, classes: list[str], shards: list[ShardIndex], max_pixels: int = MAX_PIXELS
) -> str:
    """Write `index.json` at `path` and its table beside it; index.json last.

    A view is drawn from its sample's key, so no two samples may have the same. Where shards number their samples
    alike, every key becomes SHARD/KEY.

    Returns:
        which samples had the same key, for a message; empty if none had.

    Raises:
        PipelineError: no sample at all, or a label beyond `classes`.
    """
    if alike := same_key(shards):
        shards = [_keyed_by_shard(shard) for shard in shards]
    length = max(shard.rows.dtype["key"].itemsize for shard in shards)
    rows = np.concatenate([shard.rows.astype(row_type(length)) for shard in shards])
    if not len(rows):
        raise PipelineError(
            f"{location}: no sample", expected="at least one decodable image", found="none", do="check data.train"
        )
    if rows["label"].max() >= len(classes):
        key = rows["key"][rows["label"].argmax()].decode()
        raise PipelineError(
            f"{location}: sample {key!r}",
            expected=f"a label below {len(classes)}, the number of training classes",
            found=str(rows["label"].max()),
            do="give validation the classes of training",
        )
    with atomic_write(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
    described = {
        "format": FORMAT,
        "classes": classes,
        "samples": len(rows),
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "samples": len(shard.rows),
                "rows_crc32c": google_crc32c.value(shard.rows.astype(row_type(length)).tobytes()),
            }
            for shard in shards
        ],
        "refused": [refused for shard in shards for refused in shard.refused],
    }
    if alike:
        described["keys"] = "SHARD/KEY"
    described["fingerprint"] = fingerprint(described)
    _write_described(path, described, location, path.with_suffix(".npy"), max_pixels)
    return alike


def publish_index(index: Index, path: Path) -> None:
    """The same index at another place, its table where it is; written only if it is not there already."""
    described = json.loads(Path(index.path).read_text())
    _write_described(path, described, index.location, index.table, index.max_pixels)


def _write_described(
    path: Path, described: dict[str, Any], location: str, table: str | Path, max_pixels: int
) -> None:
    # where things lie, and a limit, are no part of what they are
    beside = {"location": _place(location, path), "table": _place(table, path), "max_pixels": max_pixels}
    text = json.dumps(described | beside, indent=1) + "\n"
    with contextlib.suppress(OSError, ValueError):
        if path.read_text() == text:
            return
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def _place(target: str | Path, index: Path) -> str:
    """How an index names a place: from its own folder where both lie below the current one, so that copies hold."""
    if "://" in str(target):
        return str(target)
    here, target, folder = (os.path.abspath(path) for path in (".", target, index.parent))
    below = target == folder or all(os.path.commonpath([here, path]) == here for path in (target, folder))
    return os.path.relpath(target, folder) if below else target


def same_key(shards: list[ShardIndex]) -> str:
    """Two samples of different shards that have the same key, in words; empty if there are none."""
    keys = np.concatenate([shard.rows["key"] for shard in shards])
    order = np.argsort(keys, kind="stable")
    alike = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if not len(alike):
        return ""
    ends = np.cumsum([len(shard.rows) for shard in shards])
    first, second = (shards[np.searchsorted(ends, order[alike[0] + i], "right")].name for i in (0, 1))
    return f"{bytes(keys[order[alike[0]]]).decode()!r} in {first} and in {second}"


def _keyed_by_shard(shard: ShardIndex) -> ShardIndex:
    prefix = f"{shard.name}/".encode()
    rows = shard.rows.astype(row_type(shard.rows.dtype["key"].itemsize + len(prefix)))
    rows["key"] = [prefix + key for key in shard.rows["key"]]
    return dataclasses.replace(shard, rows=rows)
