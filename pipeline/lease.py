"""A lock for one writer, held across machines: a kernel lock where there is one, and a renewed lease.

The lease is a small JSON file: host, process and the time of the last renewal. On one machine the
kernel's lock decides, which goes with its process however that ends. A holder on another machine, or
of a store at a URL, is known by its lease alone: it is dead when it has not renewed for LEASE seconds.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import fsspec

from pipeline.errors import IO_ERRORS, PipelineError, Unreadable, UsageError, reason

LEASE = 300.0  # seconds without renewal after which a holder counts as dead
RENEWALS = 5  # in that time


@contextlib.contextmanager
def lease(path: str, purpose: str, break_lock: bool = False) -> Iterator[None]:
    """Hold the lock at `path`, a file name or URL, until the block ends.

    Args:
        break_lock: take it although another machine's lease still runs.

    Raises:
        UsageError: another process holds it; names host, process and age.
        PipelineError: no file can be written there.
    """
    filesystem, place = fsspec.core.url_to_fs(path)
    local = "file" in (protocol := filesystem.protocol) or protocol == "file"
    with _kernel_lock(place, path, purpose) if local else contextlib.nullcontext():
        holder = _read(filesystem, place)
        mine = {"host": socket.gethostname(), "process": os.getpid()}
        if holder and _lives(holder, mine, local) and not break_lock:
            raise _refused(path, purpose, holder)
        try:
            _write(filesystem, place, mine)
        except IO_ERRORS as error:
            raise _unwritable(path, error) from error
        if not local:
            _won(filesystem, place, mine, path, purpose)
        stopped = threading.Event()
        renewing = threading.Thread(target=_renew, args=(filesystem, place, mine, stopped), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            stopped.set()
            renewing.join()
            with contextlib.suppress(*IO_ERRORS, Unreadable):
                if not _lost(filesystem, place, mine):
                    filesystem.rm_file(place)


def _lives(holder: dict[str, Any], mine: dict[str, Any], local: bool) -> bool:
    if holder["host"] != mine["host"]:
        return time.time() - holder["renewed"] < LEASE
    if local:
        return False  # it does not hold the kernel's lock
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def _kernel_lock(place: str, path: str, purpose: str) -> Iterator[None]:
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        file = open(f"{place}.kernel", "a")
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refused(path, purpose, _read(fsspec.filesystem("file"), place)) from None
        yield


def _won(filesystem, place: str, mine: dict[str, Any], path: str, purpose: str) -> None:
    """Where no kernel arbitrates, the last of two who wrote at once wins."""
    time.sleep(1)
    if _lost(filesystem, place, mine):
        raise _refused(path, purpose, _read(filesystem, place))


def _renew(filesystem, place: str, mine: dict[str, Any], stopped: threading.Event) -> None:
    while not stopped.wait(LEASE / RENEWALS):
        with contextlib.suppress(*IO_ERRORS, Unreadable):  # a full disk must not end the work that it may outlast
            if _lost(filesystem, place, mine):
                return
            _write(filesystem, place, mine)


def _lost(filesystem, place: str, mine: dict[str, Any]) -> bool:
    """Whether another has taken the lease over, having broken it."""
    holder = _read(filesystem, place)
    return holder is not None and (holder["host"], holder["process"]) != (mine["host"], mine["process"])


def _write(filesystem, place: str, mine: dict[str, Any]) -> None:
    filesystem.pipe_file(place, json.dumps(mine | {"renewed": time.time()}).encode())


def _read(filesystem, place: str) -> dict[str, Any] | None:
    """The lease, or None: there is none, it was given back, or it is torn.

    Raises:
        Unreadable: it cannot be read now, so nobody knows who holds it.
    """
    try:
        data = filesystem.cat_file(place)
    except FileNotFoundError:
        return None
    except IO_ERRORS as error:
        raise Unreadable(f"{place}: cannot be read", found=reason(error), do="try again") from error
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(data)
        return {"host": str(found["host"]), "process": int(found["process"]), "renewed": float(found["renewed"])}
    return None


def _unwritable(path: str, error: Exception) -> PipelineError:
    return PipelineError(
        f"{path}: cannot be written",
        found=reason(error),
        do="make room or correct the permissions, then run the same command again: it goes on",
    )


def _refused(path: str, purpose: str, holder: dict[str, Any] | None) -> UsageError:
    found = "another process holds the lock"
    if holder:
        age = max(0, time.time() - holder["renewed"])
        found = f"process {holder['process']} on {holder['host']} holds it, renewed {age:.0f} s ago"
    return UsageError(
        f"{path}: {purpose} is under way already",
        expected="one writer of a part",
        found=found,
        do=f"wait for it or end it; of another machine's, --break-lock if it is dead (else after {LEASE:.0f} s)",
    )
