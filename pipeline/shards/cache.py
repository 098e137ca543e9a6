"""Local copies of shards at URLs, of limited size, shared by all workers and processes of a machine.

A request per image is slow and, at a cloud's prices, expensive; a shard takes one. A copy is named by the shard's
SHA-256 and appears by rename, after its bytes have been compared with that: what has its name is complete. The copies
that were used least recently are deleted first. Whatever the cache cannot do (a full disk, a shard beyond the limit, a
failed download) is left to the caller, which reads ranges of the shard from its URL.
"""

import math
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c

from pipeline.common.errors import PipelineError, is_io_error, reason
from pipeline.common.files import file_sha256
from pipeline.common.lock import kernel_lock
from pipeline.config.validation import fingerprint

GB = 10**9
COPY, PARTIAL = re.compile(r"[0-9a-f]{32}\.tar"), re.compile(r"[0-9a-f]{32}\.(\d+)\.partial")
"""File names: the hash of a shard's SHA-256 and size; in a partial file's also the size of the complete one."""
STALE_SECONDS = 60.0  # without progress, after which a partial file may be a killed process's
TOUCH_SECONDS = 1.0  # the resolution of a copy's time of last use
POLL_SECONDS = 0.05
RETRY_SECONDS = 600.0  # after a failed download


def is_remote(location: str) -> bool:
    """Whether copies of shards at a location make sense: it is a URL, and not of a cache of fsspec's."""
    scheme, separator, _ = location.partition("://")
    return bool(separator) and "::" not in scheme and scheme not in ("file", "local")


class ShardCache:
    """A folder of copies. Cheap to pickle; any number of processes may use the same folder.

    Args:
        folder: on a local disk if possible; created when it is needed.
        limit: the total size of all copies, in bytes.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._failed: dict[Path, float] = {}

    def read(self, location: str, shard: dict[str, Any], offset: int, size: int, crc32c: int) -> bytes | None:
        """Read a range from the copy of a shard, which is downloaded first if there is none.

        Args:
            location: the URL of the shard's folder.
            shard: its entry in the index: name, bytes, sha256.
            crc32c: the checksum of the range.

        Returns:
            the bytes; None if they must be read from the URL.
        """
        path = self.folder / f"{fingerprint([shard['sha256'], shard['bytes']])}.tar"
        if shard["bytes"] > self.limit or time.monotonic() < self._failed.get(path, -math.inf) + RETRY_SECONDS:
            return None
        try:
            for _ in range(3):  # another process may delete a copy before this one opens it
                with suppress(FileNotFoundError):
                    data = _read_copy(path, shard["bytes"], offset, size)
                    if google_crc32c.value(data) == crc32c:
                        return data
                    _warn("damaged", f"{path}: a damaged copy of {location}/{shard['name']}: deleted")
                    path.unlink()
                if not self._fetch(f"{location}/{shard['name']}", shard, path):
                    return None
        except Exception as error:
            if not isinstance(error, PipelineError) and not is_io_error(error):
                raise
            cause = " ".join(reason(error).split())
            kind = f"{type(error).__name__} {getattr(error, 'errno', None)}"
            _warn(kind, f"{location}/{shard['name']}: no local copy, images are read from the URL: {cause}")
            self._failed[path] = time.monotonic()
        return None

    def _fetch(self, url: str, shard: dict[str, Any], path: Path) -> bool:
        """Make a copy unless another process does so first; returns whether there was room for it.

        Raises:
            OSError, PipelineError: see `_download`; or the folder cannot be written.
        """
        partial = path.with_suffix(f".{shard['bytes']}.partial")
        while not path.exists():
            try:
                with kernel_lock(partial) as locked:
                    if not locked:
                        raise OSError(f"{self.folder} is on a file system without locks")
                    return self._download(url, shard, partial, path)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)  # another process downloads it
        return True

    def _download(self, url: str, shard: dict[str, Any], partial: Path, path: Path) -> bool:
        """Download a shard under the lock of its partial file; returns whether there was room.

        Raises:
            OSError: a full disk, no response, or the shard is not the one that was indexed.
        """
        complete = False
        try:
            if path.exists():
                return True
            if not self._make_room(shard["bytes"], partial):
                return False
            filesystem, remote = fsspec.core.url_to_fs(url)
            filesystem.get_file(remote, str(partial))
            if (found := partial.stat().st_size) != shard["bytes"]:
                raise OSError(f"{found:,} bytes instead of {shard['bytes']:,}: truncated or replaced")
            if file_sha256(partial) != shard["sha256"]:
                raise OSError("not the SHA-256 that was indexed: damaged or replaced")
            partial.replace(path)
            complete = True
            return True
        finally:
            if not complete:  # after the rename, the name may be another process's
                partial.unlink(missing_ok=True)

    def _make_room(self, size: int, own: Path) -> bool:
        """Delete the copies that were used least recently until `size` more bytes fit into the limit.

        Downloads in progress count as complete. Two processes that make room at once may delete more than they need.

        Returns:
            False if only downloads in progress are left to delete.

        Raises:
            OSError: the disk has no room.
        """
        copies, total = [], size
        for file in self.folder.iterdir():  # which may hold files of others, too
            if COPY.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    copies.append((status.st_mtime, status.st_size, file))
                    total += status.st_size
            elif (partial := PARTIAL.fullmatch(file.name)) and file != own and not _remove_abandoned(file):
                total += int(partial[1])  # also if it has just disappeared: it may be a copy that this listing lacks
        for _, freed, file in sorted(copies):
            if total <= self.limit:
                break
            file.unlink(missing_ok=True)  # whoever has it open can still read it
            total -= freed
        free = os.statvfs(self.folder)
        if free.f_bavail * free.f_frsize < size:
            raise OSError(f"{self.folder}: {free.f_bavail * free.f_frsize / GB:.2f} GB free on the disk, too little for it")
        return total <= self.limit


def _read_copy(path: Path, expected: int, offset: int, size: int) -> bytes:
    """Read a range of a copy and note the time of its last use.

    Opened for each read: a deleted file takes up space for as long as it is open.

    Raises:
        FileNotFoundError: there is no copy. One of a different size, as after a power failure, counts as none.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_size != expected:
            path.unlink()
            raise FileNotFoundError(path)
        if time.time() - status.st_mtime > TOUCH_SECONDS:
            with suppress(OSError):  # a read-only folder
                os.utime(descriptor)
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _remove_abandoned(partial: Path) -> bool:
    """Delete the partial file of a killed process; returns whether it was one."""
    with suppress(FileNotFoundError, BlockingIOError):
        if time.time() - partial.stat().st_mtime > STALE_SECONDS:
            with kernel_lock(partial) as locked:
                if locked:
                    partial.unlink()
                return locked
    return False


_warned: set[str] = set()


def _warn(kind: str, message: str) -> None:
    """Print a warning to stderr, once per process and kind."""
    if kind not in _warned:
        _warned.add(kind)
        print(f"warning: {message}", file=sys.stderr, flush=True)
