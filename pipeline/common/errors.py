"""Errors that are shown to the user without a traceback.

Each message says what was being read or done, what was expected, what was found and what to do.
"""

import errno
import os
import resource

try:
    from botocore.exceptions import BotoCoreError

    IO_ERRORS: tuple[type[Exception], ...] = (OSError, ImportError, BotoCoreError)
except ImportError:
    IO_ERRORS = (OSError, ImportError)
"""Errors of reading and writing files and URLs: S3's client raises its own, and a URL whose library is not installed
an ImportError that names it."""


def reason(error: Exception) -> str:
    """The message of an I/O error, without its number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


MAX_PART_LENGTH = 2000
"""Characters per part of a message: a value from an untrusted file may have millions."""


class PipelineError(Exception):
    """The work failed for a reason outside the program: data, files, the disk, a library version.

    Args:
        what: what was being read or done, with the name of the file.
        expected: what would have been valid.
        found: what was found instead.
        do: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", found: str = "", do: str = ""):
        marker = f"\n{type(self).__module__}.{type(self).__qualname__}: "
        if what.startswith("Caught ") and marker in what:
            # torch raises a loader worker's error again as type(error)(text), where the worker's traceback comes first
            what = what.rpartition(marker)[2].rstrip()
        self.what, self.expected, self.found = what, expected, found
        parts = [what]
        for label, text in (("expected", expected), ("found", found), ("do", do)):
            if text:
                parts.append(f"  {label + ':':<10}{text}")
        super().__init__("\n".join(map(_truncated, parts)))


def _truncated(text: str) -> str:
    return text if len(text) <= MAX_PART_LENGTH else f"{text[:MAX_PART_LENGTH]}..."


class Unreadable(PipelineError):
    """Something cannot be read now, as with a busy server or a lost connection; its contents may be intact."""


class Damaged(PipelineError):
    """Data is missing or is not what was written."""


class NotReady(PipelineError):
    """The output of an earlier stage does not exist yet; a dry run continues without it."""


class UsageError(PipelineError):
    """The command or its configuration asks for something impossible."""

    exit_code = 2


def too_many_open_files(error: BaseException) -> PipelineError | None:
    """The message when the process ran out of file descriptors; None for any other error.

    torch and `unreadable` replace the system's error with their own, of which only the text is the same.
    """
    lines = [line.strip() for line in str(error).splitlines() if os.strerror(errno.EMFILE) in line]
    if not lines:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = max(1024, 2 * limit)
    return PipelineError(
        "too many open files",
        expected=f"a limit of {enough:,} open files (ulimit -n), or fewer workers",
        found=f"a limit of {limit:,}: {lines[0].removeprefix('found:').strip()}",
        do=f"run: ulimit -n {enough}; then the same command again: it resumes",
    )


CLIENTS = {"adlfs", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "requests", "urllib3"}


def is_io_error(error: BaseException) -> bool:
    """Whether an error comes from a disk, a server or its client, whose errors are not always OSErrors."""
    return isinstance(error, IO_ERRORS) or any(kind.__module__.split(".")[0] in CLIENTS for kind in type(error).__mro__)


def unreadable(what: str, error: Exception) -> Unreadable:
    """The error for something that cannot be read now, whatever the cause."""
    do = "try again when the disk or server is available"
    if isinstance(error, ImportError):
        do = "install it"
    elif isinstance(error, MemoryError | RuntimeError):
        do = "give the process more memory or threads, or fewer workers, and try again"
    return Unreadable(f"{what}: cannot be read", found=reason(error), do=do)


def unwritable(what: str, error: Exception) -> PipelineError:
    """The error for a disk that is full or read-only, for denied access, and for a missing library."""
    if isinstance(error, ImportError):
        return PipelineError(f"{what} needs a library that is not installed", found=reason(error), do="install it")
    return PipelineError(
        f"{what} cannot be written",
        found=reason(error),
        do="make room or correct the permissions, then run the same command again to resume",
    )


def killed_worker_error(error: RuntimeError) -> PipelineError | None:
    """The error for a killed worker of torch's DataLoader; None for any other error.

    torch raises it from a signal handler, so anywhere in the main process.
    """
    text = " ".join(str(error).split())
    if "DataLoader worker (pid" not in text:
        return None
    return PipelineError(
        "a loader worker was killed",
        found=f"{text}; most likely the system ran out of memory",
        do="set a smaller `workers` for this stage, then run the same command again to resume",
    )


def out_of_memory_error(error: BaseException) -> PipelineError | None:
    """The error for memory that ran out, of the process or of a GPU; None for any other error.

    torch's is a RuntimeError, and so is numpy's after a loader worker raised it.
    """
    text = str(error).strip()
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in text
    if not (isinstance(error, MemoryError) or torchs or text.startswith("Caught _ArrayMemoryError")):
        return None
    return PipelineError(
        "out of memory",
        found=text.splitlines()[-1] if text else "an allocation that failed",
        do="set fewer `workers`, more `accumulation` or smaller batches, then run the same command again to resume",
    )
