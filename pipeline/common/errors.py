"""What a user is told without a traceback.

Every message says what was being read, what was expected, what was found and what to do.
"""

import errno
import os
import resource

try:
    from botocore.exceptions import BotoCoreError

    IO_ERRORS: tuple[type[Exception], ...] = (OSError, ImportError, BotoCoreError)
except ImportError:
    IO_ERRORS = (OSError, ImportError)
"""What reading and writing files and URLs raises: S3's client has errors of its own, and a URL whose library
is not installed gives an ImportError that names it."""


def reason(error: Exception) -> str:
    """What an IO error says, without its number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


LONGEST = 2000
"""Characters of a message's part: a value out of a stranger's file may have millions."""


class PipelineError(Exception):
    """The work failed for a reason outside the program: data, files, disk, another version.

    Args:
        what: what was being read or done, with the file's name.
        expected: what should have been there.
        found: what was there.
        do: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", found: str = "", do: str = ""):
        self.what = what
        parts = [what]
        for label, text in (("expected", expected), ("found", found), ("do", do)):
            if text:
                parts.append(f"  {label + ':':<10}{text}")
        super().__init__("\n".join(part if len(part) <= LONGEST else f"{part[:LONGEST]}..." for part in parts))


class Unreadable(PipelineError):
    """Something could not be read now: a busy server, a lost connection. It says nothing about its contents."""


class Damaged(PipelineError):
    """Bytes that are not those that were written, or are gone."""


class NotReady(PipelineError):
    """An earlier stage has not made this yet; a dry run goes on without it."""


class UsageError(PipelineError):
    """The command or its configuration asks for something impossible."""

    exit_code = 2


def too_many_open_files(error: BaseException) -> PipelineError | None:
    """The message when the process ran out of file descriptors; None for any other error.

    torch and `unreadable` replace the system's error by their own and keep its text only.
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
    """Whether an error tells of a disk, a server or its client; some clients' errors are no OSError."""
    return isinstance(error, IO_ERRORS) or any(kind.__module__.split(".")[0] in CLIENTS for kind in type(error).__mro__)


def unreadable(what: str, error: Exception) -> Unreadable:
    """What is told when a disk or server gives nothing now, whatever it was that failed."""
    do = "try again when the disk or server answers"
    if isinstance(error, ImportError):
        do = "install it"
    elif isinstance(error, MemoryError | RuntimeError):
        do = "give the process more memory or threads, or fewer workers, and try again"
    return Unreadable(f"{what}: cannot be read", found=reason(error), do=do)


def unwritable(what: str, error: Exception) -> PipelineError:
    """What is told when a disk is full, read-only or forbidden, or a library is missing."""
    if isinstance(error, ImportError):
        return PipelineError(f"{what} needs a library that is not there", found=reason(error), do="install it")
    return PipelineError(
        f"{what} cannot be written",
        found=reason(error),
        do="make room or correct the permissions, then run the same command again: it goes on",
    )


def killed_worker_error(error: RuntimeError) -> PipelineError | None:
    """What is told when a process of torch's loader was killed; None of any other error.

    torch raises that wherever the main process is at that moment, from the handler of a signal.
    """
    text = " ".join(str(error).split())
    if "DataLoader worker" not in text:
        return None
    return PipelineError(
        "a process that renders views was ended from outside",
        found=f"{text}; most likely the system was out of memory",
        do="choose a smaller `workers` of this stage, then run the same command again: it goes on",
    )
