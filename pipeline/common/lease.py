"""One writer at a time, across machines: a kernel lock where there is one, and a renewed lease.

The lease is a small JSON file: host, process, a token of this holding, and the time of the last renewal. On one
machine the kernel's lock decides, which goes with its process however that ends. A holder on another machine, or of
a store at a URL, is known by its lease alone: it is dead when it has not renewed for LEASE_SECONDS seconds. Until that is
told, who comes next waits, so that a job that was preempted here goes on elsewhere.
"""

import contextlib
import datetime
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from pipeline.common.errors import UsageError, unreadable, unwritable
from pipeline.common.files import is_local
from pipeline.common.lock import is_held, kernel_lock
from pipeline.common.signals import raise_on_sigterm

LEASE_SECONDS = 300.0  # seconds without renewal after which a holder counts as dead
RENEWALS_PER_LEASE = 5  # in that time
POLL_SECONDS = 1.0  # seconds between two looks at another's lease, and before one's own counts where no kernel arbitrates


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    host: str
    process: int
    token: str
    """Of this one holding: a container's next process may have its host's name and its number."""
    renewed: float = 0.0
    """Seconds since the epoch, by its own clock."""

    @property
    def age(self) -> float:
        return max(0.0, time.time() - self.renewed)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


@contextlib.contextmanager
def lease(path: str, purpose: str, break_lock: bool = False) -> Iterator[None]:
    """Hold the lock at `path`, a file name or URL, until the block ends.

    A lease of another machine is watched until it is renewed, given back, or LEASE_SECONDS seconds old.

    Args:
        break_lock: take it although another machine's lease still runs.

    Raises:
        UsageError: another process holds it; names host, process and age.
        PipelineError: no file can be written there.
    """
    filesystem, place = fsspec.core.url_to_fs(path)
    mine = Holder(socket.gethostname(), os.getpid(), secrets.token_hex(8))
    with _kernel_lock(place, path, purpose) if is_local(filesystem) else contextlib.nullcontext(False) as locked:
        holder = _read(filesystem, place)
        if holder and not break_lock and _may_live(holder, mine, locked):
            _watch(filesystem, place, holder, path, purpose)
        try:
            _write(filesystem, place, mine)
        except Exception as error:  # servers' clients raise nearly anything
            raise unwritable(f"{path}:", error) from error
        if not locked:
            _won(filesystem, place, mine, path, purpose)
        stopped = threading.Event()
        renewing = threading.Thread(target=_renew, args=(filesystem, place, mine, stopped), daemon=True)
        renewing.start()
        try:
            with raise_on_sigterm():
                yield
        finally:
            stopped.set()
            renewing.join()
            with contextlib.suppress(Exception):
                if not _lost(filesystem, place, mine):
                    filesystem.rm_file(place)


@contextlib.contextmanager
def _kernel_lock(place: str, path: str, purpose: str) -> Iterator[bool]:
    with contextlib.ExitStack() as stack:
        try:
            locked = stack.enter_context(kernel_lock(f"{place}.kernel"))
        except BlockingIOError:
            raise _refused(path, purpose, _read(fsspec.filesystem("file"), place)) from None
        yield locked


def _may_live(holder: Holder, mine: Holder, locked: bool) -> bool:
    if holder.age >= LEASE_SECONDS:
        return False
    if holder.host != mine.host:
        return True
    return not locked and _runs(holder.process)  # where it can, this machine's kernel has told already


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def part_lease_path(store: str, number: int, parts: int) -> str:
    """Where the lease of a part of a store's units lies."""
    return f"{store}.part-{number}-of-{parts}.lock"


@contextlib.contextmanager
def part_lease(store: str, number: int, parts: int, purpose: str, break_lock: bool = False) -> Iterator[None]:
    """Hold the lease of a part of a store's units until the block ends.

    Who divides the store into another number of parts has units of this part among its own, so it must not run.

    Raises:
        UsageError: another process holds this part, or one of another number of parts; names host, process and age.
        PipelineError: no file can be written there.
    """
    with lease(part_lease_path(store, number, parts), purpose, break_lock):
        filesystem, _ = fsspec.core.url_to_fs(store)
        for other, other_is_held in part_leases(store).items():
            if other_is_held and not other.endswith(f"-of-{parts}.lock"):
                holder = _read(filesystem, other)
                if is_held(f"{other}.kernel"):
                    raise _refused(other, f"another division than into {parts} parts", holder)
                if holder and not break_lock:
                    _watch(filesystem, other, holder, other, f"another division than into {parts} parts")
        yield


def part_leases(store: str) -> dict[str, bool]:
    """The parts' locks that lie beside a store, by path: whether each is held."""
    filesystem, root = fsspec.core.url_to_fs(store)
    filesystem.invalidate_cache()  # another machine may have come since
    ours = re.compile(re.escape(root) + r"\.part-\d+-of-\d+\.lock(\.kernel)?")
    beside = filesystem.ls(root.rpartition("/")[0], detail=True)
    files = {info["name"]: info for info in beside if ours.fullmatch(info["name"])}
    return {lock: _is_held(lock, files.get(lock)) for lock in {name.removesuffix(".kernel") for name in files}}


def possibly_held(store: str) -> set[str]:
    """The parts' locks beside a store that are held, or may be: another machine's lease counts whatever its age."""
    filesystem, _ = fsspec.core.url_to_fs(store)
    told = {lock: is_held(f"{lock}.kernel") for lock in part_leases(store)}
    return {lock for lock, known in told.items() if known or (known is None and filesystem.exists(lock))}


def _is_held(lock: str, lease: dict[str, Any] | None) -> bool:
    told = is_held(f"{lock}.kernel")
    if told is None:
        return lease is not None and time.time() - modified(lease) < LEASE_SECONDS
    return told


def modified(info: dict[str, Any]) -> float:
    """When a file was written, by what its file system tells: a local one's has `mtime`, S3's `LastModified`."""
    when = info.get("mtime") or info.get("LastModified") or 0.0
    return when.timestamp() if isinstance(when, datetime.datetime) else float(when)


def _watch(filesystem: AbstractFileSystem, place: str, holder: Holder, path: str, purpose: str) -> None:
    """Wait until a lease shows life, and refuse then; return when none is to be expected any more."""
    left = min(LEASE_SECONDS - holder.age, LEASE_SECONDS)
    print(f"{purpose}: {holder} may be at it; waits {left:.0f} s at most for a sign of its life", flush=True)
    end = time.monotonic() + left
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        found = _read(filesystem, place)
        if found is None:
            return
        if found != holder:
            raise _refused(path, purpose, found)


def _won(filesystem: AbstractFileSystem, place: str, mine: Holder, path: str, purpose: str) -> None:
    """Where no kernel arbitrates, the last of two who wrote at once wins."""
    time.sleep(POLL_SECONDS)
    if _lost(filesystem, place, mine):
        raise _refused(path, purpose, _read(filesystem, place))


def _renew(filesystem: AbstractFileSystem, place: str, mine: Holder, stopped: threading.Event) -> None:
    while not stopped.wait(LEASE_SECONDS / RENEWALS_PER_LEASE):
        with contextlib.suppress(Exception):  # a full disk must not end the work that it may outlast
            if _lost(filesystem, place, mine):
                return
            _write(filesystem, place, mine)


def _lost(filesystem: AbstractFileSystem, place: str, mine: Holder) -> bool:
    """Whether another has taken the lease over, having broken it."""
    holder = _read(filesystem, place)
    return holder is not None and holder.token != mine.token


def _write(filesystem: AbstractFileSystem, place: str, mine: Holder) -> None:
    """Whole or not at all: who reads it torn would take the lease for given back."""
    data = json.dumps(asdict(mine) | {"renewed": time.time()}).encode()
    if not is_local(filesystem):
        filesystem.pipe_file(place, data)
        return
    temporary = Path(f"{place}.{mine.token}.partial")
    temporary.write_bytes(data)
    temporary.replace(place)


def _read(filesystem: AbstractFileSystem, place: str) -> Holder | None:
    """The lease, or None: there is none, it was given back, or it is torn.

    Raises:
        Unreadable: it cannot be read now, so nobody knows who holds it.
    """
    try:
        data = filesystem.cat_file(place)
    except FileNotFoundError:
        return None
    except Exception as error:  # as above
        raise unreadable(place, error) from error
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        found: dict[str, Any] = json.loads(data)
        return Holder(str(found["host"]), int(found["process"]), str(found["token"]), float(found["renewed"]))
    return None


def _refused(path: str, purpose: str, holder: Holder | None) -> UsageError:
    found = "another process holds the lock"
    if holder:
        found = f"{holder} holds it, renewed {holder.age:.0f} s ago"
    return UsageError(
        f"{path}: {purpose} is under way already",
        expected="one writer of a part",
        found=found,
        do="wait for it or end it",
    )
