"""Read a data set by its index.

The index is `index.json` (shards, classes, refused images) and a table of rows, a `.npy` of records that is
memory-mapped, so 1.28 million samples never become Python objects. It may be stored elsewhere than
the shards, which may be read-only, at a URL, and written by anyone.

Refused: a damaged or missing shard, a member whose checksum differs from the indexed one. Nothing is ever substituted
or skipped.
"""

import json
import os
from pathlib import Path

import google_crc32c
import numpy as np

from pipeline.common.errors import NotReady, PipelineError, is_io_error, reason
from pipeline.config.validation import fingerprint
from pipeline.shards.cache import ShardCache
from pipeline.shards.files import ShardFiles
from pipeline.shards.images import Undecodable, decode_trusted
from pipeline.shards.index_file import (
    FORMAT,
    PATHS,
    UNLABELLED,
    invalid_value,
    row_type,
    samples_fingerprint,
)

OPEN = 64  # shards whose rows are kept: a few times Training.open_shards


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
            cache: for copies of shards at a URL; None: every sample is read from the URL.

        Raises:
            NotReady: `path` is missing.
            PipelineError: it is of another format, or was altered.
        """
        self.path = str(path)
        try:
            content = json.loads(Path(path).read_text())
            claimed = content.pop("digest")
            self.location, self.table = (_resolve(content.pop(key), path) for key in PATHS)
            self.max_pixels: int = content["max_pixels"]
            if content["format"] != FORMAT or fingerprint(content) != claimed:
                raise ValueError("the digest does not match the contents")
            if samples_fingerprint(content) != content["fingerprint"]:
                raise ValueError("the fingerprint does not match the samples")
            if invalid := invalid_value(content):
                raise ValueError(f"invalid: {invalid}")
            if type(self.max_pixels) is not int:
                raise ValueError("invalid: max_pixels")
        except FileNotFoundError:
            raise NotReady(f"{path}: no index", do="run: pipeline prepare") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise PipelineError(
                f"{path}: not a complete index of format {FORMAT}",
                found=reason(error),
                do="run: pipeline prepare",
            ) from error
        self.fingerprint: str = content["fingerprint"]
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
                found=reason(error),
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
                    found="a different checksum: the table was damaged or replaced",
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
                expected=f"an image that can be decoded, of at most {self.max_pixels:,} pixels",
                found=str(error),
                do="run: pipeline prepare",
            ) from error
