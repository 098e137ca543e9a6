"""Files that are whole or absent, and what killed writers left."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fsspec import AbstractFileSystem

from pipeline.common.errors import unwritable


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on disk, when the block ends well.

    Raises:
        PipelineError: the disk is full, read-only or forbidden; `path` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(f"{path}:", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


StatSignature = tuple[int, int, int]


def stat_signature(status: os.stat_result) -> StatSignature:
    """Size, time of the contents' last change, time of any last change: a file of the same stamp is the same file."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_conclusive(stamped: StatSignature, when: float) -> bool:
    """Whether a stamp taken at `when` (seconds) tells of every change since: a clock's tick may hide one in the same."""
    return max(stamped[1:]) < (when - 2) * 1e9


def is_local(filesystem: AbstractFileSystem) -> bool:
    """Whether an fsspec file system is this machine's own, mounted ones among it."""
    return "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files that killed writers left below a folder."""
    for partial in folder.rglob("*.partial"):
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
