"""The bytes of a data set's shards: local files, local copies of shards at a URL, or ranges of these."""

import contextlib
import os
from typing import Any

import fsspec
import numpy as np

from pipeline.shards.cache import ShardCache, is_remote

OPEN = 64  # files kept open: a few times Training.open_shards
REQUESTS = 16  # at a time and process, to one server


class ShardFiles:
    """Reads ranges of shards. Cheap to pickle: a worker opens files and connections itself.

    Args:
        location: folder or URL of the shards.
        shards: their entries in the index: name, bytes, sha256.
        cache: for copies of shards at a URL; None: ranges are read from the URL.
    """

    def __init__(self, location: str, shards: list[dict[str, Any]], cache: ShardCache | None = None):
        self.location, self.shards = location, shards
        self.cache = cache if is_remote(location) else None
        self._files: dict[int, int] = {}

    def __getstate__(self):
        return self.__dict__ | {"_files": {}}

    def __del__(self):
        for descriptor in getattr(self, "_files", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def read(self, shard: int, rows: np.ndarray) -> list[bytes]:
        """Read the images of rows of the index. Only what comes from a copy has been compared with its checksum.

        Raises:
            OSError: the shard is missing or of a different size. Servers' clients may raise something else, see
                `is_io_error`.
        """
        if "://" not in self.location:
            return [self._pread(shard, int(row["offset"]), int(row["size"])) for row in rows]
        copied = [self._read_copy(shard, row) for row in rows]
        missing = [number for number, data in enumerate(copied) if data is None]
        requested = iter(self._read_ranges(shard, rows[missing]) if missing else ())
        return [next(requested) if data is None else data for data in copied]

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            if len(self._files) >= OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            entry = self.shards[shard]
            self._files[shard] = _open_shard(f"{self.location}/{entry['name']}", entry["bytes"])
        return os.pread(self._files[shard], size, offset)

    def _read_copy(self, shard: int, row: np.ndarray) -> bytes | None:
        if self.cache is None:
            return None
        where = int(row["offset"]), int(row["size"]), int(row["crc32c"])
        return self.cache.read(self.location, self.shards[shard], *where)

    def _read_ranges(self, shard: int, rows: np.ndarray) -> list[bytes]:
        """A request per row; several at a time, where the file system is able to."""
        starts, ends = rows["offset"].tolist(), (rows["offset"] + rows["size"]).tolist()
        filesystem, path = fsspec.core.url_to_fs(f"{self.location}/{self.shards[shard]['name']}")
        if len(rows) > 1 and filesystem.async_impl:
            found = filesystem.cat_ranges([path] * len(rows), starts, ends, batch_size=REQUESTS)
            for data in found:
                if isinstance(data, BaseException):
                    raise data
            return found
        return [filesystem.cat_file(path, start=start, end=end) for start, end in zip(starts, ends, strict=True)]


def _open_shard(where: str, expected: int) -> int:
    """Open a shard; returns a file descriptor.

    Raises:
        OSError: it is missing, or its size is not the indexed one.
    """
    descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    if (found := os.fstat(descriptor).st_size) != expected:
        os.close(descriptor)
        raise OSError(f"{found:,} bytes instead of {expected:,}: truncated or replaced")
    return descriptor
