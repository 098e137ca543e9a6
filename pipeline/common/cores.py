"""How this machine's cores are shared out: to loader workers, and to torch's threads; and how many files they open."""

import os
import resource

from pipeline.common.errors import UsageError

OPEN_FILES, OPEN_FILES_PER_WORKER = 32, 16
"""What a process with loader workers opens at most; 8 workers were seen to take 116."""


def available_cores() -> int:
    """Cores that a process may use: its own share, where torchrun starts several on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def resolve_workers(chosen: int | None, gpu: bool) -> int:
    """Loader workers: as many as are chosen, or what suits the machine.

    Beside a GPU all cores but one, 16 at most; where the cores compute too, half of them.
    """
    if chosen is not None:
        return chosen
    return min(available_cores() - 1, 16) if gpu else available_cores() // 2


def limit_threads(workers: int) -> None:
    """Leave the workers a core each: torch takes all of them for its threads, and each step waits for the slowest.

    OMP_NUM_THREADS, which torchrun sets, is somebody's choice and stays.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(available_cores() - workers, 1))


def allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files to what its loader workers need.

    Without it a worker that cannot open a file leaves the others waiting.

    Raises:
        UsageError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OPEN_FILES_PER_WORKER * workers if workers else 0
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard < needed and hard != resource.RLIM_INFINITY:
        raise UsageError(
            f"{workers} loader workers",
            expected=f"a limit of at least {needed} open files (ulimit -n)",
            found=f"{hard}",
            do="raise the limit, or choose fewer `workers` for this stage",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
