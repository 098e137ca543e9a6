"""The kernel's lock on a file: it goes with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pipeline.common.errors import unwritable

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # said by network file systems without them

_mine: set[TextIO] = set()


@contextlib.contextmanager
def kernel_lock(path: str | Path, waiting: str = "") -> Iterator[bool]:
    """Hold the lock at a local path until the block ends; yields False where the file system knows no locks.

    Args:
        waiting: printed where another process holds it, before waiting for that one to end.

    Raises:
        BlockingIOError: another process holds it, and `waiting` is empty.
        PipelineError: no file can be written there.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(path))
        while (locked := _lock(file, waiting)) and not _in_place(file, path):
            file = stack.enter_context(_open(path))  # who had it has deleted it, with its folder
        if locked:
            _mine.add(file)
            with contextlib.suppress(OSError):  # a full disk: nobody is told who holds it
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), socket.gethostname().encode())
        try:
            yield locked
        finally:
            _mine.discard(file)


def _open(path: str | Path) -> TextIO:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "a")
    except OSError as error:
        raise unwritable(f"{path}:", error) from error


def _in_place(file: TextIO, path: str | Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def is_held(path: str | Path) -> bool | None:
    """Whether a process holds the lock; None where that is not for this machine's kernel to tell."""
    try:
        with open(path, "rb") as file:
            if file.read(1000) != socket.gethostname().encode():  # or damaged: whatever bytes those are
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def _lock(file: TextIO, waiting: str) -> bool:
    try:
        try:
            _try(file)
        except BlockingIOError:
            if not waiting:
                raise
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _try(file: TextIO) -> None:
    with contextlib.suppress(BlockingIOError):
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    time.sleep(0.1)  # somebody may have been looking: see `held`
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _let_go() -> None:
    """In a forked child: a loader's workers, which outlive a killed parent by seconds, must not hold its lock."""
    for file in _mine:
        file.close()
    _mine.clear()


os.register_at_fork(after_in_child=_let_go)
