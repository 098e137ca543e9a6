"""How a machine's cores are divided between loader workers and torch's threads, and how many files they may open."""

import os
import resource

from pipeline.common.errors import UsageError


def available_cores() -> int:
    """Cores available to this process: an equal share if torchrun started several on this machine."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def resolve_workers(chosen: int | None, gpu: bool) -> int:
    """Number of loader workers: `chosen`, or a default for the machine.

    The default is all cores but one, at most 16, with a GPU, and half the cores where they also train.
    """
    if chosen is not None:
        return chosen
    return min(available_cores() - 1, 16) if gpu else available_cores() // 2


def limit_threads(workers: int) -> None:
    """Reserve a core for each worker: torch uses all cores by default, and each step waits for its slowest thread.

    OMP_NUM_THREADS, which torchrun sets, takes precedence.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(available_cores() - workers, 1))


def needed_open_files(workers: int) -> int:
    """An upper bound for a process with loader workers, 8 of which were observed to need 116; 0 without workers."""
    return 32 + 16 * workers if workers else 0


def allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files as far as its loader workers need.

    Without it a worker that cannot open a file leaves the others waiting.

    Raises:
        UsageError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = needed_open_files(workers)
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
