"""Read a data set by its index.

The index is `index.json` (shards, classes, refused images, one fingerprint of it all) and a table of rows, a `.npy` of
records that is memory-mapped, so 1.28 million samples never become Python objects. It may be stored elsewhere than
the shards, which may be read-only, at a URL, and written by anyone.

Refused: a damaged or missing shard, a member whose checksum differs from the indexed one. Nothing is ever substituted
or skipped.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.common.errors import NotReady, PipelineError, is_io_error, reason
from pipeline.config.validation import fingerprint
from pipeline.shards.cache import ShardCache
from pipeline.shards.files import ShardFiles
from pipeline.shards.images import MAX_PIXELS, Undecodable, decode_trusted

MAX_CLASSES = 65535  # class numbers are uint16 in the store, whose fill value is 65535
UNLABELLED = -1  # the label of a sample that has none
FORMAT = 1
PATHS = ("location", "table")  # the keys of index.json that hold paths
OPEN = 64  # shards whose rows are kept: a few times Training.open_shards


def row_type(key_length: int) -> np.dtype:
    """A row of the table: where a sample's image is in its shard, its label and its checksum."""
    return np.dtype(
        [("key", f"S{key_length}"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32c", "<u4")]
    )


@dataclass
class ShardIndex:
    """What indexing one shard yields."""

    name: str
    rows: np.ndarray
    bytes: int
    sha256: str
    refused: list[dict[str, str]] = field(default_factory=list)
    """Shard, key and reason of each image that does not decode. These have no row."""


def _invalid(content: dict[str, Any]) -> str:
    """A value that no index written here has, even if the fingerprint matches; empty if there is none."""
    shards = content["shards"]
    numbers = {"bytes": 2**63, "samples": 2**31, "rows_crc32c": 2**32}

    def number(value: Any, limit: int) -> bool:
        return type(value) is int and 0 <= value < limit

    def name(value: Any) -> bool:
        return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)

    for position, shard in enumerate(shards):
        if not name(shard["name"]):
            return f"shards[{position}].name: {shard['name']!r}"
        for key, limit in numbers.items():
            if not number(shard[key], limit):
                return f"shards[{position}].{key}: {shard[key]!r}"
        if not isinstance(shard["sha256"], str):
            return f"shards[{position}].sha256: {shard['sha256']!r}"
    if len({shard["name"] for shard in shards}) < len(shards):
        return "a duplicate shard"
    if content["samples"] != sum(shard["samples"] for shard in shards) or not 0 < content["samples"] < 2**31:
        return f"samples: {content['samples']!r}"
    if not 0 < len(content["classes"]) <= MAX_CLASSES or not all(isinstance(c, str) for c in content["classes"]):
        return "classes"
    if not number(content.get("unlabelled", 0), content["samples"] + 1):
        return f"unlabelled: {content['unlabelled']!r}"
    if not all(isinstance(bad[key], str) for bad in content["refused"] for key in ("shard", "key", "reason")):
        return "refused"
    return ""


def _resolve(path: str, index: str | Path) -> str:
    """A path or URL from an index, made absolute without following links, as it was written."""
    return path if "://" in path else os.path.abspath(os.path.join(os.path.dirname(index), path))


class Index:
    """A data set's index; reads samples by (shard, position) and verifies every byte it returns.

    Cheap to pickle: a worker opens table and shards itself.
    """

    def __init__(self, path: str | Path, cache: ShardCache | None = None):
        """
        Args:
            cache: for copies of shards at a URL; None: every sample is read at the URL.

        Raises:
            NotReady: `path` is missing.
            PipelineError: it is of another format, or was altered.
        """
        self.path = str(path)
        try:
            content = json.loads(Path(path).read_text())
            claimed = content.pop("fingerprint")
            self.location, self.table = (_resolve(content.pop(key), path) for key in PATHS)
            self.max_pixels: int = content.pop("max_pixels", MAX_PIXELS)
            if content["format"] != FORMAT or fingerprint(content) != claimed:
                raise ValueError("the fingerprint does not match the contents")
            if invalid := _invalid(content) or ("max_pixels" * (type(self.max_pixels) is not int)):
                raise ValueError(f"invalid: {invalid}")
        except FileNotFoundError:
            raise NotReady(f"{path}: no index", do="run: pipeline prepare") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise PipelineError(
                f"{path}: not a complete index of format {FORMAT}",
                found=reason(error) if isinstance(error, OSError) else str(error)[:500],
                do="run: pipeline prepare",
            ) from error
        self.fingerprint: str = claimed
        self.classes: list[str] = content["classes"]
        self.keyed_by_shard: bool = "keys" in content
        self.unlabelled: int = content.get("unlabelled", 0)  # samples
        self.refused: list[dict[str, str]] = content["refused"]
        self.shards: list[dict] = content["shards"]
        self.names = [shard["name"] for shard in self.shards]
        self.samples = np.array([shard["samples"] for shard in self.shards], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.samples)])
        self.files = ShardFiles(self.location, self.shards, cache)
        self._rows: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self):
        return self.__dict__ | {"_rows": {}}

    def _read_rows(self, shard: int) -> np.ndarray:
        """Copy a shard's rows from the table, which is mapped only meanwhile: it never counts as resident memory."""
        try:
            # not np.load, which would open archives and pickles too
            table = np.lib.format.open_memmap(self.table, mode="r")
            if table.shape != (len(self),) or table.dtype != row_type(table.dtype["key"].itemsize):
                raise ValueError(f"{table.shape} rows of {table.dtype}")
            return np.array(table[self.starts[shard] : self.starts[shard + 1]])
        except MemoryError:
            raise
        except Exception as error:  # a damaged header makes numpy raise almost anything
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
                    expected="the checksum in index.json",
                    found="another: the table was damaged or replaced",
                    do="run: pipeline prepare",
                )
            if found := self._invalid_row(shard, rows):
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

    def _invalid_row(self, shard: int, rows: np.ndarray) -> str:
        """A value in the rows that no shard can have; empty if there is none."""
        ends, least = rows["offset"] + rows["size"], UNLABELLED if self.unlabelled else 0
        valid = {
            "label": (rows["label"] >= least) & (rows["label"] < len(self.classes)),
            "size": rows["size"] > 0,
            "offset": (rows["offset"] >= np.concatenate([[0], ends[:-1]])) & (ends <= self.shards[shard]["bytes"]),
            "key": rows["key"] != b"",
        }
        for field_name, passed in valid.items():
            if not passed.all():
                row = rows[passed.argmin()]
                return f"{field_name} {row[field_name]} of sample {row['key']!r}"
        return ""

    def locate(self, row: int) -> tuple[int, int]:
        """Shard and position of a sample's row in the table."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])

    def class_name(self, label: int) -> str:
        """The name of a label's class."""
        return "unlabelled" if label == UNLABELLED else self.classes[label]

    def labels(self) -> np.ndarray:
        """All samples' labels in index order, int64 (samples,); UNLABELLED where a sample has none."""
        return np.concatenate([self.rows(shard)["label"] for shard in range(len(self.names))]).astype(np.int64)

    def read(self, shard: int, position: int) -> bytes:
        """Read a sample's encoded image; see `read_many`."""
        return self.read_many(shard, [position])[0]

    def read_many(self, shard: int, positions: list[int]) -> list[bytes]:
        """Read encoded images of a shard's samples: at a URL, several requests at a time.

        Raises:
            PipelineError: the shard is missing or truncated, or the bytes are not those that were indexed.
        """
        rows = self.rows(shard)[positions]
        try:
            found = self.files.read(shard, rows)
        except Exception as error:
            if not is_io_error(error):
                raise
            raise PipelineError(
                f"{self.location}/{self.names[shard]}: the shard cannot be read",
                expected="the shard that was indexed",
                found=reason(error),
                do="restore it, or run: pipeline prepare",
            ) from error
        for row, data in zip(rows, found, strict=True):
            if google_crc32c.value(data) != row["crc32c"]:
                raise PipelineError(
                    f"{self.location}/{self.names[shard]}: sample {row['key'].decode()!r} at byte {row['offset']}",
                    expected=f"{row['size']} bytes with crc32c {row['crc32c']:08x}, as indexed",
                    found=f"{len(data)} bytes with crc32c {google_crc32c.value(data):08x}: damaged or replaced",
                    do="restore the shard, or run: pipeline prepare",
                )
        return found

    def image(self, shard: int, position: int) -> np.ndarray:
        """Read and decode a sample's image, uint8 (height, width, 3); see `images`."""
        return self.images(shard, [position])[0]

    def images(self, shard: int, positions: list[int]) -> list[np.ndarray]:
        """Read and decode images of a shard's samples.

        Raises:
            PipelineError: see `read_many`; or bytes are as indexed, but not an image, which prepare never indexes.
        """
        encoded = self.read_many(shard, positions)
        return [self._decode(data, shard, position) for data, position in zip(encoded, positions, strict=True)]

    def _decode(self, data: bytes, shard: int, position: int) -> np.ndarray:
        try:
            return decode_trusted(data, self.max_pixels)
        except Undecodable as error:
            raise PipelineError(
                f"{self.location}/{self.names[shard]}: sample {self.rows(shard)[position]['key'].decode()!r}",
                expected=f"an image of at most {self.max_pixels:,} pixels",
                found=str(error),
                do="run prepare again (dvc repro -f prepare): it did not write this index",
            ) from error
