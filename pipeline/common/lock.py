"""Exclusive kernel locks (flock) on files; a lock ends with its process, however that ends.

filelock cannot tell whether a lock is held without taking it, fails a waiter whose lock file is deleted with its folder
(as `pipeline prune` does), and treats most file systems without flock as an error.
"""

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

UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # from network file systems without flock

_held_here: set[TextIO] = set()


@contextlib.contextmanager
def kernel_lock(path: str | Path, waiting: str = "") -> Iterator[bool]:
    """Hold the lock on a local file for the duration of the block; yields False if its file system has no locks.

    Args:
        waiting: if another process holds the lock, print this and wait for it.

    Raises:
        BlockingIOError: another process holds the lock, and `waiting` is empty.
        PipelineError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(path))
        while (locked := _lock(file, waiting)) and not _is_current(file, path):
            file = stack.enter_context(_open(path))  # the previous holder has deleted it, with its folder
        if locked:
            _held_here.add(file)
            with contextlib.suppress(OSError):  # a full disk: then `is_held` does not know the host
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), socket.gethostname().encode())
        try:
            yield locked
        finally:
            _held_here.discard(file)


def is_held(path: str | Path) -> bool | None:
    """Whether a process holds the lock; None if this machine cannot tell, because another machine took it last."""
    try:
        with open(path, "rb") as file:
            if file.read(1000) != socket.gethostname().encode():  # bytes: the file may be damaged
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def _open(path: str | Path) -> TextIO:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "a")
    except OSError as error:
        raise unwritable(f"{path}:", error) from error


def _is_current(file: TextIO, path: str | Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _lock(file: TextIO, waiting: str) -> bool:
    try:
        try:
            _lock_now(file)
        except BlockingIOError:
            if not waiting:
                raise
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _lock_now(file: TextIO) -> None:
    with contextlib.suppress(BlockingIOError):
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    time.sleep(0.1)  # `is_held` in another process holds a shared lock for a moment
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _close_in_child() -> None:
    """Close inherited files: a loader's workers outlive a killed parent by seconds and must not keep its locks."""
    for file in _held_here:
        file.close()
    _held_here.clear()


os.register_at_fork(after_in_child=_close_in_child)
