"""Write, index and read WebDataset shards.

A shard is a tar of `KEY.jpg` (png, webp) and `KEY.cls`. Its index is `index.json` (shards, classes,
refused images, one fingerprint of it all) and a table of rows, a `.npy` of records that is memory
mapped, so 1.28 million samples never become Python objects. The index may lie elsewhere than the
shards, which may be read-only, at a URL, and written by anyone.

Refused: a damaged or missing shard, a member whose checksum is not the indexed one. Nothing is ever
substituted or skipped.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np

from pipeline.common.errors import IO_ERRORS, NotReady, PipelineError, reason
from pipeline.config.validation import fingerprint
from pipeline.shards.images import MAX_PIXELS, Undecodable, decode_trusted

MAX_CLASSES = 65535  # class numbers are uint16 in the store, whose fill value is 65535
FORMAT = 1
PLACES = ("location", "table")  # what index.json says of where things lie
OPEN = 64  # shards whose rows and files stay at hand: a few times Training.open_shards


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
            raise NotReady(f"{path}: no index", do="run: pipeline prepare") from None
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
            return decode_trusted(data, self.max_pixels)
        except Undecodable as error:
            raise PipelineError(
                f"{self.location}/{self.names[shard]}: sample {self.rows(shard)[position]['key'].decode()!r}",
                expected=f"an image of at most {self.max_pixels:,} pixels",
                found=str(error),
                do="run prepare again (dvc repro -f prepare): the index is not of its making",
            ) from error
