"""Collective operations between the processes that torchrun started; without torchrun, of one process alone."""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process among those started by torchrun; rank 0 of 1 without it."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls, device: torch.device) -> "Rank":
        """Join the process group that torchrun's environment describes, if there is one.

        Tensors on GPUs go through nccl, tensors on CPUs and Python objects through gloo.
        """
        size = world_size()
        if size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, **_rendezvous_options())
        return cls(int(os.environ.get("RANK", "0")), size)

    @staticmethod
    def destroy_process_group() -> None:
        """Leave the process group, if this process has joined one; the other ranks must be about to leave it too."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy rank 0's values into the tensors of all ranks."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank, sent through the CPU; other ranks' values are ignored."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def local_range(self, count: int) -> range:
        """This rank's range of `count` items: consecutive; sizes of ranges differ by at most one."""
        return self.ranges(count)[self.rank]

    def ranges(self, count: int) -> list[range]:
        """Every rank's range of `count` items, in rank order."""
        ends = [count * rank // self.world_size for rank in range(self.world_size + 1)]
        return [range(first, last) for first, last in itertools.pairwise(ends)]

    def all_gather(self, own: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
        """Concatenate all ranks' rows, `local_range(count)` from each, in rank order; on the CPU, on every rank."""
        if self.world_size == 1:
            return own
        sizes = [len(items) for items in self.ranges(count)]
        padded = torch.zeros(max(sizes), *own.shape[1:], dtype=own.dtype, device=device)
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([rows[:size].cpu() for rows, size in zip(gathered, sizes, strict=True)])


def world_size() -> int:
    """Number of processes started by torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_groups = itertools.count()


def _rendezvous_options() -> dict[str, Any]:
    """Arguments that give the ranks of this attempt a key-value store of their own.

    torchrun keeps one store across restarts, in which a restarted rank may find the address of one that is dead
    (pytorch issue 167288); so may a rank that joins a second process group. On one node all ranks know the number of
    the attempt; across several nodes they do not.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": PrefixStore(f"attempt-{attempt}-{next(_groups)}", store), "rank": rank, "world_size": world}
