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


def empty_images(*shape: int) -> torch.Tensor:
    """An uninitialized uint8 tensor; in a worker it is in shared memory, so that returning it copies nothing."""
    return _empty_shared(*shape) if get_worker_info() else torch.empty(shape, dtype=torch.uint8)


def _empty_shared(*shape: int) -> torch.Tensor:
    size = math.prod(shape)
    try:
        storage = torch.UntypedStorage._new_shared(size)  # as torch's own default_collate does
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        free = shutil.disk_usage("/dev/shm").free if os.path.exists("/dev/shm") else 0
        raise PipelineError(
            "shared memory for the images that workers render",
            expected=f"{size / 2**20:,.1f} MiB more",
            found=f"{free / 2**20:,.1f} MiB free in /dev/shm",
            do="enlarge it (docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm), or set fewer workers; 0"
            " needs none",
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue] as torch does


_pools, _pool_ids = weakref.WeakValueDictionary(), itertools.count()


class BufferPool:
    """Shared buffers that workers render slices into, reused from slice to slice.

    Fresh shared memory takes a tenth to a quarter of a worker's time, because the kernel clears and maps every page.
    Reused memory takes none, but must not change while anything refers to it. So each buffer is in one of three
    states, which only the training process changes: free; acquired by a task that is sent to a worker; or in use,
    from the arrival of the task's result until nothing in this process refers to its memory any longer: no tensor,
    view, storage or NumPy array. A buffer whose worker failed stays acquired. When no buffer is free, the worker
    allocates memory of its own.
    """

    def __init__(self, count: int, shape: tuple[int, ...]):
        self.buffers = [_empty_shared(*shape) for _ in range(count)]
        self.free, self.acquired = list(range(count)), set()
        self.id = next(_pool_ids)
        _pools[self.id] = self

    def acquire(self) -> int | None:
        """The number of a free buffer; None if there is none."""
        if not self.free:
            return None
        buffer = self.free.pop()  # the last one released: no more memory is touched than is needed at once
        self.acquired.add(buffer)
        return buffer

    def use(self, buffer: int) -> torch.Tensor:
        """An acquired buffer as a tensor; the buffer is free again when the tensor's memory is no longer referenced.

        Raises:
            KeyError: the buffer is not acquired.
        """
        self.acquired.remove(buffer)
        # the tensor's storage, which everything that sees its pixels keeps alive, owns this very array
        array = self.buffers[buffer].numpy()
        weakref.finalize(array, self.free.append, buffer).atexit = False
        return torch.from_numpy(array)


class BufferRef(NamedTuple):
    """What a worker returns in place of the pixels in a buffer; it is unpickled as the buffer's tensor.

    Unpickling does it, so that the loader's thread that pins memory sees the tensor too.
    """

    pool: int
    buffer: int

    def __reduce__(self):
        return _use, tuple(self)


def _use(pool: int, buffer: int) -> torch.Tensor:
    return _pools[pool].use(buffer)
