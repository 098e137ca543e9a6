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
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import google_crc32c
import numpy as np
from webdataset.writer import TarWriter

from pipeline.common.errors import IO_ERRORS, NotYet, PipelineError, reason
from pipeline.common.files import atomic_write, settled, stamp
from pipeline.config.validation import fingerprint
from pipeline.shards.images import MAX_PIXELS, Undecodable, decode, decode_again
from pipeline.shards.tar import Damaged, Member, Tar

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
MAX_CLASSES = 65535  # class numbers are uint16 in the store, whose fill value is 65535
FORMAT = 1
BYTES_A_PIXEL = 8  # of an image's file at most: 16 bits of each of red, green, blue and alpha, not compressed
PLACES = ("location", "table")  # what index.json says of where things lie
VERSIONS = ("ETag", "LastModified", "Last-Modified", "Content-MD5", "last_modified", "updated", "mtime", "created")
"""What file systems behind URLs tell of a file besides its size, by their names for it."""
OPEN = 64  # shards whose rows and files stay at hand: a few times Training.open_shards


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, int]]) -> None:
    """One tar of (key, image type, image bytes, label), whole or not at all; same input, same bytes."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file, TarWriter(file, mtime=0) as tar:
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
    if member.size > min(2**31 - 1, BYTES_A_PIXEL * max_pixels + 2**20):
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


def publish_index(index: "Index", path: Path) -> None:
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


def _impossible(described: dict[str, Any]) -> str:
    """What an index says that none written here says, whatever its fingerprint; empty if there is nothing."""
    shards = described["shards"]
    numbers = {"bytes": 2**63, "samples": 2**31, "rows_crc32c": 2**32}

    def number(value: Any, limit: int) -> bool:
        return type(value) is int and 0 <= value < limit

    def name(value: Any) -> bool:
        return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)

    for place, shard in enumerate(shards):
        if not name(shard["name"]):
            return f"shards[{place}].name: {shard['name']!r}"
        for key, limit in numbers.items():
            if not number(shard[key], limit):
                return f"shards[{place}].{key}: {shard[key]!r}"
        if not isinstance(shard["sha256"], str):
            return f"shards[{place}].sha256: {shard['sha256']!r}"
    if len({shard["name"] for shard in shards}) < len(shards):
        return "a shard stands twice"
    if described["samples"] != sum(shard["samples"] for shard in shards) or not 0 < described["samples"] < 2**31:
        return f"samples: {described['samples']!r}"
    if not 0 < len(described["classes"]) <= MAX_CLASSES or not all(isinstance(c, str) for c in described["classes"]):
        return "classes"
    if not all(isinstance(bad[key], str) for bad in described["refused"] for key in ("shard", "key", "reason")):
        return "refused"
    return ""


def _found(place: str, index: str | Path) -> str:
    """The path or URL that an index means by a place. Lexically, as it was written: links are not followed."""
    return place if "://" in place else os.path.abspath(os.path.join(os.path.dirname(index), place))


def _opened(where: str, expected: int) -> int:
    """A descriptor of a shard.

    Raises:
        OSError: it is not there, or not of the size that it had when it was indexed.
    """
    descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    if (found := os.fstat(descriptor).st_size) != expected:
        os.close(descriptor)
        raise OSError(f"{found:,} bytes instead of {expected:,}: cut or replaced")
    return descriptor


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
            self.max_pixels: int = described.pop("max_pixels", MAX_PIXELS)
            if described["format"] != FORMAT or fingerprint(described) != claimed:
                raise ValueError("its fingerprint is not that of its contents")
            if found := _impossible(described) or ("max_pixels" * (type(self.max_pixels) is not int)):
                raise ValueError(f"impossible: {found}")
        except FileNotFoundError:
            raise NotYet(f"{path}: no index", do="run: pipeline prepare") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise PipelineError(
                f"{path}: not a whole index of format {FORMAT}",
                found=reason(error) if isinstance(error, OSError) else str(error)[:500],
                do="run: pipeline prepare",
            ) from error
        self.fingerprint: str = claimed
        self.classes: list[str] = described["classes"]
        self.keyed_by_shard: bool = "keys" in described
        self.refused: list[dict[str, str]] = described["refused"]
        self.shards: list[dict] = described["shards"]
        self.names = [shard["name"] for shard in self.shards]
        self.samples = np.array([shard["samples"] for shard in self.shards], np.int64)
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
            # not np.load, which opens archives and pickles too
            table = np.lib.format.open_memmap(self.table, mode="r")
            if table.shape != (len(self),) or table.dtype != row_type(table.dtype["key"].itemsize):
                raise ValueError(f"{table.shape} rows of {table.dtype}")
            return np.array(table[self.starts[shard] : self.starts[shard + 1]])
        except MemoryError:
            raise
        except Exception as error:  # a damaged header makes numpy raise nearly anything
            raise PipelineError(
                f"{self.table}: the table of {self.path} cannot be read",
                expected=f"{len(self)} rows",
                found=str(error)[:500],
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
            if found := self._misplaced(shard, rows):
                raise PipelineError(
                    f"{self.table}: the rows of {self.names[shard]}",
                    expected=f"samples one after another in {self.shards[shard]['bytes']:,} bytes,"
                    f" of {len(self.classes)} classes",
                    found=found,
                    do="run: pipeline prepare",
                )
            if len(self._rows) >= OPEN:
                self._rows.pop(next(iter(self._rows)))
            self._rows[shard] = rows
        return self._rows[shard]

    def _misplaced(self, shard: int, rows: np.ndarray) -> str:
        """What rows say that no whole shard bears out; empty if there is nothing."""
        ends = rows["offset"] + rows["size"]
        sound = {
            "label": (rows["label"] >= 0) & (rows["label"] < len(self.classes)),
            "size": rows["size"] > 0,
            "offset": (rows["offset"] >= np.concatenate([[0], ends[:-1]])) & (ends <= self.shards[shard]["bytes"]),
            "key": rows["key"] != b"",
        }
        for field_name, right in sound.items():
            if not right.all():
                row = rows[right.argmin()]
                return f"{field_name} {row[field_name]} of sample {row['key']!r}"
        return ""

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
            filesystem, path = fsspec.core.url_to_fs(where)
            return filesystem.cat_file(path, start=offset, end=offset + size)
        if shard not in self._files:
            if len(self._files) >= OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = _opened(where, self.shards[shard]["bytes"])
        return os.pread(self._files[shard], size, offset)

    def image(self, shard: int, position: int) -> np.ndarray:
        """A sample's decoded image, uint8 (height, width, 3).

        Raises:
            PipelineError: see `read`; or the bytes are as indexed, but no image: prepare never indexes such.
        """
        data = self.read(shard, position)
        try:
            return decode_again(data, self.max_pixels)
        except Undecodable as error:
            raise PipelineError(
                f"{self.location}/{self.names[shard]}: sample {self.rows(shard)[position]['key'].decode()!r}",
                expected=f"an image of at most {self.max_pixels:,} pixels",
                found=str(error),
                do="run prepare again (dvc repro -f prepare): the index is not of its making",
            ) from error
