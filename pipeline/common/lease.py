"""Leases: one writer at a time, across machines and at URLs.

A lease is a small JSON file with the holder's host and process, a random token and the time of its last renewal. On one
machine a kernel lock decides (pipeline.common.lock), which ends with its process. A holder on another machine, or of a
store at a URL, is known by its lease alone and counts as dead LEASE_SECONDS after the last renewal. Until then a
newcomer waits, so that a job that was preempted on one machine resumes on another.

filelock.SoftFileLease is not a replacement: it needs a local path, and `work: s3://...` has leases at URLs.
"""

import contextlib
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
from pipeline.common.files import is_local, modification_time
from pipeline.common.lock import is_held, kernel_lock
from pipeline.common.signals import raise_on_sigterm

LEASE_SECONDS = 300.0  # without renewal, until a holder counts as dead
RENEWALS_PER_LEASE = 5
POLL_SECONDS = 1.0  # between two reads of another process's lease, and before a new lease counts where there is no kernel lock


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    host: str
    process: int
    token: str
    """Random: a container's successor may have the same host name and process number."""
    renewed: float = 0.0
    """Seconds since the epoch, by the holder's clock."""

    @property
    def age(self) -> float:
        return max(0.0, time.time() - self.renewed)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


@dataclass(frozen=True)
class _LeaseFile:
    """The file of a lease, on a disk or at a URL."""

    path: str
    """As shown to the user."""
    filesystem: AbstractFileSystem
    place: str
    """Path within the file system."""

    def read(self) -> Holder | None:
        """The holder; None if the file is missing, because it was given back, or incomplete.

        Raises:
            Unreadable: it cannot be read now, so the holder is unknown.
        """
        try:
            data = self.filesystem.cat_file(self.place)
        except FileNotFoundError:
            return None
        except Exception as error:  # clients of servers raise almost anything
            raise unreadable(self.place, error) from error
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            found: dict[str, Any] = json.loads(data)
            return Holder(str(found["host"]), int(found["process"]), str(found["token"]), float(found["renewed"]))
        return None

    def write(self, mine: Holder) -> None:
        """Renew the lease atomically: an incomplete file would look like a lease that was given back."""
        data = json.dumps(asdict(mine) | {"renewed": time.time()}).encode()
        if not is_local(self.filesystem):
            self.filesystem.pipe_file(self.place, data)
            return
        temporary = Path(f"{self.place}.{mine.token}.partial")
        temporary.write_bytes(data)
        temporary.replace(self.place)

    def lost(self, mine: Holder) -> bool:
        """Whether another process has broken this lease and taken it."""
        holder = self.read()
        return holder is not None and holder.token != mine.token

    def confirm(self, mine: Holder, purpose: str) -> None:
        """Without a kernel lock, the last of two processes that write at once wins; refuse the other one."""
        time.sleep(POLL_SECONDS)
        if self.lost(mine):
            raise self.refusal(purpose, self.read())

    def keep_renewing(self, mine: Holder, stopped: threading.Event) -> None:
        while not stopped.wait(LEASE_SECONDS / RENEWALS_PER_LEASE):
            with contextlib.suppress(Exception):  # the work may outlast a disk that is full for a while
                if self.lost(mine):
                    return
                self.write(mine)

    def wait_until_dead(self, holder: Holder, purpose: str) -> None:
        """Return when the lease is given back or expires; refuse when it is renewed."""
        left = min(LEASE_SECONDS - holder.age, LEASE_SECONDS)
        print(f"{purpose}: {holder} may still be running; waiting at most {left:.0f} s to find out", flush=True)
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            found = self.read()
            if found is None:
                return
            if found != holder:
                raise self.refusal(purpose, found)

    def refusal(self, purpose: str, holder: Holder | None) -> UsageError:
        found = "another process holds the lock"
        if holder:
            found = f"{holder} holds it, renewed {holder.age:.0f} s ago"
        return UsageError(
            f"{self.path}: {purpose} is already running",
            expected="one writer per part",
            found=found,
            do="wait for it or end it",
        )


@contextlib.contextmanager
def lease(path: str, purpose: str, break_lock: bool = False) -> Iterator[None]:
    """Hold the lease at `path`, a file name or URL, for the duration of the block.

    If another machine has it, wait until it is renewed, given back, or LEASE_SECONDS old.

    Args:
        break_lock: take it even if another machine's lease has not expired.

    Raises:
        UsageError: another process holds it; names its host, process and age.
        PipelineError: the file cannot be written.
    """
    file = _LeaseFile(path, *fsspec.core.url_to_fs(path))
    mine = Holder(socket.gethostname(), os.getpid(), secrets.token_hex(8))
    with _kernel_lock(file, purpose) as locked:
        holder = file.read()
        if holder and not break_lock and _may_be_alive(holder, mine, locked):
            file.wait_until_dead(holder, purpose)
        try:
            file.write(mine)
        except Exception as error:  # clients of servers raise almost anything
            raise unwritable(f"{path}:", error) from error
        if not locked:
            file.confirm(mine, purpose)
        stopped = threading.Event()
        renewal = threading.Thread(target=file.keep_renewing, args=(mine, stopped), daemon=True)
        renewal.start()
        try:
            with raise_on_sigterm():
                yield
        finally:
            stopped.set()
            renewal.join()
            with contextlib.suppress(Exception):
                if not file.lost(mine):
                    file.filesystem.rm_file(file.place)


@contextlib.contextmanager
def _kernel_lock(file: _LeaseFile, purpose: str) -> Iterator[bool]:
    """Yields whether the kernel's lock is held: not at URLs, nor on file systems without locks."""
    with contextlib.ExitStack() as stack:
        locked = False
        if is_local(file.filesystem):
            try:
                locked = stack.enter_context(kernel_lock(_kernel_lock_path(file.place)))
            except BlockingIOError:
                raise file.refusal(purpose, file.read()) from None
        yield locked


def _kernel_lock_path(place: str) -> str:
    return f"{place}.kernel"


def _may_be_alive(holder: Holder, mine: Holder, locked: bool) -> bool:
    if holder.age >= LEASE_SECONDS:
        return False
    if holder.host != mine.host:
        return True
    return not locked and _exists(holder.process)  # a kernel lock that could be taken has no living holder here


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def part_lease_path(store: str, number: int, parts: int) -> str:
    """Path or URL of the lease of part number/parts of a store."""
    return f"{store}.part-{number}-of-{parts}.lock"


@contextlib.contextmanager
def part_lease(store: str, number: int, parts: int, purpose: str, break_lock: bool = False) -> Iterator[None]:
    """Hold the lease of part number/parts of a store for the duration of the block.

    A division into a different number of parts would overlap with this one, so its writers must not be running.

    Raises:
        UsageError: another process holds this part, or a part of a different division; names its host, process and age.
        PipelineError: the file cannot be written.
    """
    with lease(part_lease_path(store, number, parts), purpose, break_lock):
        filesystem, _ = fsspec.core.url_to_fs(store)
        for place, active in part_leases(store).items():
            if active and not place.endswith(f"-of-{parts}.lock"):
                other = _LeaseFile(place, filesystem, place)
                division = f"a job that divides the store into a number of parts other than {parts}"
                holder = other.read()
                if is_held(_kernel_lock_path(place)):
                    raise other.refusal(division, holder)
                if holder and not break_lock:
                    other.wait_until_dead(holder, division)
        yield


def part_leases(store: str) -> dict[str, bool]:
    """The leases of a store's parts by path within the file system: whether each is active."""
    filesystem, root = fsspec.core.url_to_fs(store)
    filesystem.invalidate_cache()  # another machine may have added one
    pattern = re.compile(re.escape(root) + r"\.part-\d+-of-\d+\.lock(\.kernel)?")
    listed = filesystem.ls(root.rpartition("/")[0], detail=True)
    files = {info["name"]: info for info in listed if pattern.fullmatch(info["name"])}
    return {place: _is_active(place, files.get(place)) for place in {name.removesuffix(".kernel") for name in files}}


def _is_active(place: str, info: dict[str, Any] | None) -> bool:
    known = is_held(_kernel_lock_path(place))
    if known is None:
        return info is not None and time.time() - modification_time(info) < LEASE_SECONDS
    return known


def possibly_held(store: str) -> set[str]:
    """The leases of a store's parts that may be held: those of other machines count whatever their age."""
    filesystem, _ = fsspec.core.url_to_fs(store)
    known = {place: is_held(_kernel_lock_path(place)) for place in part_leases(store)}
    return {place for place, held in known.items() if held or (held is None and filesystem.exists(place))}
