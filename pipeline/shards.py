"""Write, index and read WebDataset shards.

A shard is a tar of `KEY.jpg` (png, webp) and `KEY.cls`. Its index is `index.json` (shards, classes,
refused images, one fingerprint of it all) and a table of rows, a `.npy` of records that is memory
mapped, so 1.28 million samples never become Python objects. The index may lie elsewhere than the
shards, which may be read-only, at a URL, and written by anyone.

Refused: a damaged or missing shard, a member whose checksum is not the indexed one. Nothing is ever
substituted or skipped.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import webdataset

from pipeline.errors import IO_ERRORS, PipelineError, reason
from pipeline.files import replacing, settled, stamp
from pipeline.strict import fingerprint
from pipeline.views import Undecodable, decode, decode_again

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
MAX_CLASSES = 65535  # class numbers are uint16 in the store, whose fill value is 65535
FORMAT = 1
PLACES = ("location", "table")  # what index.json says of where things lie
VERSIONS = ("ETag", "LastModified", "Last-Modified", "Content-MD5", "last_modified", "updated", "mtime", "created")
"""What file systems behind URLs tell of a file besides its size, by their names for it."""
OPEN = 64  # shards whose rows and files stay at hand: a few times Training.open_shards


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, int]]) -> None:
    """One tar of (key, image type, image bytes, label), whole or not at all; same input, same bytes."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        with webdataset.TarWriter(file, mtime=0) as tar:
            for key, image_type, image, label in samples:
                tar.write({"__key__": key, image_type: image, "cls": str(label)})


def row_type(key_length: int) -> np.dtype:
    """A row of the table: where a sample's image lies in its shard, and what it must be."""
    return np.dtype(
        [("key", f"S{key_length}"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32c", "<u4")]
    )


@dataclass
class ShardIndex:
    """What one reading of one shard found."""

    name: str
    rows: np.ndarray
    bytes: int
    sha256: str
    refused: list[dict[str, str]] = field(default_factory=list)
    """Images that do not decode: key and reason. They have no row."""


def index_shard(location: str, name: str) -> ShardIndex:
    """Read a shard once: find every sample, decode its image strictly, hash its bytes.

    Raises:
        PipelineError: no such shard, damaged tar, a sample without label or image, a key twice.
    """
    where = f"{location}/{name}"
    try:
        with fsspec.open(where, "rb") as file:
            data = file.read()
        members = _members(data)
    except (*IO_ERRORS, tarfile.TarError) as error:
        raise _unreadable(where, error) from error
    rows, refused, seen = [], [], set()
    for key, parts in members:
        found = [extension for extension in parts if extension in IMAGE_TYPES]
        label = _label(data, parts.get("cls"))
        if len(found) != 1 or label is None or key in seen:
            raise PipelineError(
                f"{where}: sample {key!r}",
                expected=f"one image ({', '.join(IMAGE_TYPES)}), a .cls with a class number, a key that stands once",
                found="the key stands twice" if key in seen else f"members {sorted(parts)}, class {label}",
                do="mend the shard",
            )
        seen.add(key)
        offset, size = parts[found[0]]
        image = data[offset : offset + size]
        try:
            decode(image)
        except Undecodable as error:
            refused.append({"shard": name, "key": key, "reason": str(error)})
        else:
            rows.append((key.encode(), offset, size, label, google_crc32c.value(image)))
    length = max((len(row[0]) for row in rows), default=1)
    return ShardIndex(
        name, np.array(rows, row_type(length)), len(data), hashlib.sha256(data).hexdigest(), refused
    )


def shard_stamp(location: str, name: str) -> Any:
    """A JSON value that is another when the shard is; None where nothing but its contents would tell.

    Raises:
        PipelineError: no such shard, or no answer.
    """
    where, now = f"{location}/{name}", time.time()
    try:
        if "://" not in where:
            found = stamp(os.stat(where))
            return [*found] if settled(found, now) else None
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
        found=str(error) or type(error).__name__,
        do="restore the shard, or remove it and run prepare again",
    )


def _members(data: bytes) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, size)}) in tar order, as webdataset groups members."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if not member.isreg():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if not stem or not extension:
                continue  # README, ._x.jpg: no sample to webdataset either
            key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
            if not samples or samples[-1][0] != key or extension in samples[-1][1]:
                samples.append((key, {}))
            samples[-1][1][extension] = (member.offset_data, member.size)
        end = tar.offset
    # tarfile ends quietly where a header is damaged or the data is cut
    if len(data) - end < 1024 or any(data[end:]):
        raise tarfile.ReadError(f"damaged or cut after byte {end}: a tar ends with 1,024 zero bytes")
    return samples


def _label(data: bytes, part: tuple[int, int] | None) -> int | None:
    if part is None:
        return None
    text = data[part[0] : part[0] + part[1]].strip()
    return int(text) if text.isdigit() and len(text) < 6 and int(text) < MAX_CLASSES else None


def write_index(path: Path, location: str, classes: list[str], shards: list[ShardIndex]) -> str:
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
    with replacing(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
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
    _write_described(path, described, location, path.with_suffix(".npy"))
    return alike


def publish_index(index: "Index", path: Path) -> None:
    """The same index at another place, its table where it is; written only if it is not there already."""
    described = json.loads(Path(index.path).read_text())
    _write_described(path, described, index.location, index.table)


def _write_described(path: Path, described: dict, location: str, table: str | Path) -> None:
    # where things lie is no part of what they are
    places = {"location": _place(location, path), "table": _place(table, path)}
    text = json.dumps(described | places, indent=1) + "\n"
    with contextlib.suppress(OSError, ValueError):
        if path.read_text() == text:
            return
    with replacing(path) as temporary:
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
    return f"{keys[order[alike[0]]].decode()!r} in {first} and in {second}"


def _keyed_by_shard(shard: ShardIndex) -> ShardIndex:
    prefix = f"{shard.name}/".encode()
    rows = shard.rows.astype(row_type(shard.rows.dtype["key"].itemsize + len(prefix)))
    rows["key"] = [prefix + key for key in shard.rows["key"]]
    return dataclasses.replace(shard, rows=rows)


def _found(place: str, index: str | Path) -> str:
    """The path or URL that an index means by a place. Lexically, as it was written: links are not followed."""
    return place if "://" in place else os.path.abspath(os.path.join(os.path.dirname(index), place))


class Index:
    """A data set's index; reads samples by (shard, position) and checks every byte it hands out.

    Cheap to pickle: a worker opens table and shards itself.
    """

    def __init__(self, path: str | Path):
        """
        Raises:
            PipelineError: `path` is missing, of another format, or was altered.
        """
        self.path = str(path)
        try:
            described = json.loads(Path(path).read_text())
            claimed = described.pop("fingerprint")
            self.location, self.table = (_found(described.pop(place), path) for place in PLACES)
            if described["format"] != FORMAT or fingerprint(described) != claimed:
                raise ValueError("its fingerprint is not that of its contents")
        except FileNotFoundError:
            raise PipelineError(f"{path}: no index", do="run: pipeline prepare") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise PipelineError(
                f"{path}: not a whole index of format {FORMAT}",
                found=str(error),
                do="run: pipeline prepare",
            ) from error
        self.fingerprint: str = claimed
        self.classes: list[str] = described["classes"]
        self.keyed_by_shard: bool = "keys" in described
        self.refused: list[dict[str, str]] = described["refused"]
        self.shards: list[dict] = described["shards"]
        self.names = [shard["name"] for shard in self.shards]
        self.samples = np.array([shard["samples"] for shard in self.shards])
        self.starts = np.concatenate([[0], np.cumsum(self.samples)])
        self._rows: dict[int, np.ndarray] = {}
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self):
        return self.__dict__ | {"_rows": {}, "_files": {}}

    def __del__(self):
        for descriptor in getattr(self, "_files", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _read_rows(self, shard: int) -> np.ndarray:
        """A shard's rows out of the table, which is mapped only for so long: it counts as no one's memory."""
        try:
            table = np.load(self.table, mmap_mode="r")
            if len(table) != len(self) or table.dtype != row_type(table.dtype["key"].itemsize):
                raise ValueError(f"{len(table)} rows of {table.dtype}")
            return np.array(table[self.starts[shard] : self.starts[shard + 1]])
        except Exception as error:  # a damaged header makes numpy raise nearly anything
            raise PipelineError(
                f"{self.table}: the table of {self.path} cannot be read",
                expected=f"{len(self)} rows",
                found=str(error),
                do="run: pipeline prepare",
            ) from error

    def rows(self, shard: int) -> np.ndarray:
        """A shard's rows, `row_type` (samples,), in tar order.

        Raises:
            PipelineError: the table is missing or damaged.
        """
        if shard not in self._rows:
            rows = self._read_rows(shard)
            if google_crc32c.value(rows.tobytes()) != self.shards[shard]["rows_crc32c"]:
                raise PipelineError(
                    f"{self.table}: the rows of {self.names[shard]}",
                    expected="the checksum that index.json names",
                    found="another: the table was damaged or replaced",
                    do="run: pipeline prepare",
                )
            if len(self._rows) >= OPEN:
                self._rows.pop(next(iter(self._rows)))
            self._rows[shard] = rows
        return self._rows[shard]

    def shard(self, number: int) -> ShardIndex:
        """A shard as it was when it was indexed.

        Raises:
            PipelineError: the table is missing or damaged.
        """
        about = self.shards[number]
        refused = [bad for bad in self.refused if bad["shard"] == about["name"]]
        return ShardIndex(about["name"], self.rows(number), about["bytes"], about["sha256"], refused)

    def labels(self) -> np.ndarray:
        """int64 (samples,), over all shards."""
        return np.concatenate([self.rows(shard)["label"] for shard in range(len(self.names))]).astype(np.int64)

    def read(self, shard: int, position: int) -> bytes:
        """A sample's encoded image.

        Raises:
            PipelineError: the shard is missing or cut, or the bytes are not those that were indexed.
        """
        row = self.rows(shard)[position]
        offset, size = int(row["offset"]), int(row["size"])
        try:
            data = self._pread(shard, offset, size)
        except IO_ERRORS as error:
            raise PipelineError(
                f"{self.location}/{self.names[shard]}: the shard cannot be read",
                expected="the shard that was indexed",
                found=reason(error),
                do="restore it, or run: pipeline prepare",
            ) from error
        if google_crc32c.value(data) != row["crc32c"]:
            raise PipelineError(
                f"{self.location}/{self.names[shard]}: sample {row['key'].decode()!r} at byte {offset}",
                expected=f"{size} bytes with crc32c {row['crc32c']:08x}, as indexed",
                found=f"{len(data)} bytes with crc32c {google_crc32c.value(data):08x}: damaged or replaced",
                do="restore the shard, or run: pipeline prepare",
            )
        return data

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        where = f"{self.location}/{self.names[shard]}"
        if "://" in where:
            return fsspec.open(where).fs.cat_file(where, start=offset, end=offset + size)
        if shard not in self._files:
            if len(self._files) >= OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._files[shard], size, offset)

    def image(self, shard: int, position: int) -> np.ndarray:
        """A sample's decoded image, uint8 (height, width, 3)."""
        return decode_again(self.read(shard, position))
