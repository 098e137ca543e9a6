"""Write shards, and index shards, whoever wrote them.

Refused: a missing or damaged shard, and a sample that is not one image and one class number. Nothing is ever
substituted or skipped silently: images that do not decode are listed in the index with the reason.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import google_crc32c
import numpy as np
from webdataset.writer import TarWriter

from pipeline.common.errors import PipelineError, is_io_error, reason
from pipeline.common.files import atomic_write, is_conclusive, stat_signature, write_if_changed
from pipeline.config.validation import fingerprint
from pipeline.shards.images import FORMATS, MAX_PIXELS
from pipeline.shards.index import Index
from pipeline.shards.index_file import FORMAT, UNLABELLED, ShardIndex, row_type, samples_fingerprint
from pipeline.shards.samples import Labels, read_samples, sample_row
from pipeline.shards.tar import CHUNK, InvalidTar, Tar

LABELS = Labels()
VERSIONS = ("ETag", "LastModified", "Last-Modified", "Content-MD5", "last_modified", "updated", "mtime", "created")
"""Names under which fsspec's file systems report a version or modification time of a file."""


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, int]]) -> None:
    """Write a tar of (key, image type, image bytes, label) atomically; the same input gives the same bytes."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file, TarWriter(file, mtime=0) as tar:
        for key, image_type, image, label in samples:
            tar.write({"__key__": key, image_type: image, "cls": str(label)})


def index_shard(
    location: str,
    name: str,
    max_pixels: int = MAX_PIXELS,
    source_formats: tuple[str, ...] = FORMATS,
    labels: Labels = LABELS,
) -> ShardIndex:
    """Read a shard once: find every sample, decode its image strictly, hash its bytes.

    Args:
        max_pixels: an image of more is refused before it is decoded.
        source_formats: what the images were before the shard was written. One that could not be converted is stored
            as it was, and the reason why it is refused is the one found when reading it in its own format.
        labels: where the class numbers are.

    Raises:
        PipelineError: no such shard, damaged tar, a sample without label or image, a duplicate key.
    """
    where = f"{location}/{name}"
    rows: list[tuple[bytes, int, int, int, int]] = []
    refused: list[dict[str, str]] = []
    seen: set[str] = set()
    content = hashlib.blake2b(digest_size=16)
    with _reading(where), fsspec.open(where, "rb") as file:
        tar = Tar(cast(BinaryIO, file))
        for key, fields in read_samples(tar, max_pixels, source_formats, labels):
            found = sample_row(where, key, fields, key in seen, labels)
            seen.add(key)
            if isinstance(found, str):
                refused.append({"shard": name, "key": key, "reason": found})
            else:
                row, image = found
                rows.append(row)
                content.update(b"%b\0%d\0%b" % (row[0], row[3], image))
    length = max((len(row[0]) for row in rows), default=1)
    return ShardIndex(name, np.array(rows, row_type(length)), tar.bytes, tar.sha256.hexdigest(), content.hexdigest(), refused)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever a disk, a server's client or a damaged tar raises into a PipelineError that names the shard."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, InvalidTar) and not is_io_error(error):
            raise
        raise PipelineError(
            f"{where}: the shard cannot be read",
            expected="a tar of KEY.jpg (png, webp) and KEY.cls members",
            found=reason(error),
            do="correct its name or restore it; if prepare wrote it, remove it and run: pipeline prepare",
        ) from error


def shard_sha256(location: str, name: str) -> str:
    """The SHA-256 of a shard's bytes, all of which are read.

    Raises:
        PipelineError: no such shard, or no response.
    """
    where, found = f"{location}/{name}", hashlib.sha256()
    with _reading(where), fsspec.open(where, "rb") as file:
        while data := cast(BinaryIO, file).read(CHUNK):
            found.update(data)
    return found.hexdigest()


def shard_signature(location: str, name: str) -> Any:
    """A JSON value that changes when the shard does; None where only its contents would tell.

    Raises:
        PipelineError: no such shard, or no response.
    """
    where, now = f"{location}/{name}", time.time()
    with _reading(where):
        if "://" not in where:
            found = stat_signature(os.stat(where))
            return [*found] if is_conclusive(found, now) else None
        filesystem, path = fsspec.core.url_to_fs(where)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
    versions = {key: str(info[key]) for key in VERSIONS if info.get(key) is not None}
    return [info.get("size"), versions] if versions else None


def write_index(
    path: Path, location: str, classes: list[str], shards: list[ShardIndex], max_pixels: int = MAX_PIXELS
) -> str:
    """Write `index.json` at `path` and its table next to it; index.json last.

    A view is drawn from its sample's key, so keys must be unique. Where shards reuse keys, every key becomes
    SHARD/KEY.

    Returns:
        which samples had the same key, for a message; empty if none had.

    Raises:
        PipelineError: no samples, or a label beyond `classes`.
    """
    if duplicate := duplicate_key(shards):
        shards = [_keyed_by_shard(shard) for shard in shards]
    length = max(shard.rows.dtype["key"].itemsize for shard in shards)
    rows = np.concatenate([shard.rows.astype(row_type(length)) for shard in shards])
    _check_rows(location, rows, len(classes))
    with atomic_write(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
    content = {
        "format": FORMAT,
        "classes": classes,
        "samples": len(rows),
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "content": shard.content,
                "samples": len(shard.rows),
                "rows_crc32c": google_crc32c.value(shard.rows.astype(row_type(length)).tobytes()),
            }
            for shard in shards
        ],
        "refused": [refused for shard in shards for refused in shard.refused],
    }
    if duplicate:
        content["keys"] = "SHARD/KEY"
    if unlabelled := int((rows["label"] == UNLABELLED).sum()):
        content["unlabelled"] = unlabelled
    content["fingerprint"] = samples_fingerprint(content)
    content["max_pixels"] = max_pixels
    content["digest"] = fingerprint(content)
    _write_index(path, content, location, path.with_suffix(".npy"))
    return duplicate


def _check_rows(location: str, rows: np.ndarray, classes: int) -> None:
    if not len(rows):
        raise PipelineError(
            f"{location}: no sample", expected="at least one decodable image", found="none", do="check data.train"
        )
    if rows["label"].max() >= classes:
        key = rows["key"][rows["label"].argmax()].decode()
        raise PipelineError(
            f"{location}: sample {key!r}",
            expected=f"a label below {classes}, the number of training classes",
            found=str(rows["label"].max()),
            do="give validation the classes of training, or correct data.class_names",
        )


def publish_index(index: Index, path: Path) -> None:
    """Write the same index at another path, referring to the same table; no write if it is already there."""
    content = json.loads(Path(index.path).read_text())
    _write_index(path, content, index.location, index.table)


def _write_index(path: Path, content: dict[str, Any], location: str, table: str | Path) -> None:
    # the digest does not cover paths
    extra = {"location": _reference(location, path), "table": _reference(table, path)}
    write_if_changed(path, json.dumps(content | extra, indent=1) + "\n")


def _reference(target: str | Path, index: Path) -> str:
    """A path as an index stores it: relative to the index if both are below the current folder, so copies work."""
    if "://" in str(target):
        return str(target)
    here, target, folder = (os.path.abspath(path) for path in (".", target, index.parent))
    below = target == folder or all(os.path.commonpath([here, path]) == here for path in (target, folder))
    return os.path.relpath(target, folder) if below else target


def duplicate_key(shards: list[ShardIndex]) -> str:
    """Name a key that occurs in two shards, and the shards; empty if there is none."""
    keys = np.concatenate([shard.rows["key"] for shard in shards])
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if not len(equal):
        return ""
    ends = np.cumsum([len(shard.rows) for shard in shards])
    first, second = (shards[np.searchsorted(ends, order[equal[0] + i], "right")].name for i in (0, 1))
    return f"{bytes(keys[order[equal[0]]]).decode()!r} in {first} and in {second}"


def _keyed_by_shard(shard: ShardIndex) -> ShardIndex:
    prefix = f"{shard.name}/".encode()
    rows = shard.rows.astype(row_type(shard.rows.dtype["key"].itemsize + len(prefix)))
    rows["key"] = [prefix + key for key in shard.rows["key"]]
    return dataclasses.replace(shard, rows=rows)
