"""Files that are whole or absent, and locks that go with their process."""

import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError, UsageError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on disk, when the block ends well.

    Raises:
        PipelineError: the disk is full, read-only or forbidden; `path` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        temporary.replace(path)
    except OSError as error:
        raise PipelineError(
            f"{path}: cannot be written",
            found=error.strerror or str(error),
            do="make room or correct the permissions, then run the same command again: it goes on",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold a file lock; it goes with the process, however that ends.

    Raises:
        UsageError: another process holds it; names host and process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{path}: {purpose} is under way already",
                found=file.read().strip() or "another process holds the lock",
                do="wait for it, or end that process",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
