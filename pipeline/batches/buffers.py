"""Memory that a loader's workers render into, shared with the process that they render for."""

import itertools
import math
import os
import shutil
import weakref
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from pipeline.common.errors import PipelineError


def memory(*shape: int) -> torch.Tensor:
    """uint8, whatever it holds; a worker's is shared at once, so that handing it over copies nothing."""
    return _shared(*shape) if get_worker_info() else torch.empty(shape, dtype=torch.uint8)


def _shared(*shape: int) -> torch.Tensor:
    size = math.prod(shape)
    try:
        storage = torch.UntypedStorage._new_shared(size)  # as torch's own default_collate does
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        free = shutil.disk_usage("/dev/shm").free if os.path.exists("/dev/shm") else 0
        raise PipelineError(
            "shared memory for the pictures that workers render",
            expected=f"{size / 2**20:,.1f} MiB more",
            found=f"{free / 2**20:,.1f} MiB free in /dev/shm",
            do="make it larger (docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm), or set fewer"
            " workers; 0 needs none",
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue] as torch does


_pools, _pool_numbers = weakref.WeakValueDictionary(), itertools.count()


class Pool:
    """Shared buffers that workers render slices into again and again.

    Fresh shared memory takes a tenth to a quarter of a worker's time: the kernel clears and maps every
    page. Memory used again takes none, but must not change while anyone sees it. So a buffer is always
    one of three, and the process that trains alone decides which: free; taken by a task that goes to a
    worker; or lent, from the arrival of the task's result until nothing in this process refers to its
    memory any more: no tensor, view, storage or NumPy array. What a worker never gives back, having
    failed, stays taken. Where none is free, the worker makes memory of its own.
    """

    def __init__(self, count: int, shape: tuple[int, ...]):
        self.buffers = [_shared(*shape) for _ in range(count)]
        self.free, self.taken = list(range(count)), set()
        self.number = next(_pool_numbers)
        _pools[self.number] = self

    def take(self) -> int | None:
        if not self.free:
            return None
        buffer = self.free.pop()  # the last let go of: no more are touched than are needed at once
        self.taken.add(buffer)
        return buffer

    def lend(self, buffer: int) -> torch.Tensor:
        self.taken.remove(buffer)  # a KeyError if it is not with a worker
        # the tensor's storage, which all that sees its pixels keeps alive, owns this very array
        array = self.buffers[buffer].numpy()
        weakref.finalize(array, self.free.append, buffer).atexit = False
        return torch.from_numpy(array)


class Rendered(NamedTuple):
    """Goes from a worker in place of the pixels in a buffer, and arrives as the buffer's tensor.

    Unpickling makes it, so that the loader's thread that pins memory finds the tensor too.
    """

    pool: int
    buffer: int

    def __reduce__(self):
        return _arrived, tuple(self)


def _arrived(pool: int, buffer: int) -> torch.Tensor:
    return _pools[pool].lend(buffer)
