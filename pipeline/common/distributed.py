"""The processes of a job that torchrun started, and what they tell one another."""

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
    """This process among those that torchrun started; alone otherwise."""

    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: torch.device) -> "Rank":
        """Join the process group where torchrun's environment names one: nccl on GPUs, gloo on CPUs and for objects."""
        world = world_size()
        if world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, **_meeting_place())
        return cls(int(os.environ.get("RANK", "0")), world)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @staticmethod
    def leave() -> None:
        """Leave the process group, if this process has joined one; the others must be about to leave it too."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def tell(self, value: T) -> T:
        """Rank 0's value, on every rank, by way of the CPU; the others' are ignored."""
        if self.world == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, device=torch.device("cpu"))
        return told[0]

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Rank 0's values, into all ranks' tensors."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def share(self, count: int) -> range:
        """This rank's part of `count` things: consecutive, sizes that differ by one at most."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[range]:
        ends = [count * rank // self.world for rank in range(self.world + 1)]
        return [range(first, last) for first, last in itertools.pairwise(ends)]

    def gather(self, own: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
        """The rows of all ranks, `share(count)` each, in order; on the CPU, the same on every rank."""
        if self.world == 1:
            return own
        sizes = [len(share) for share in self.shares(count)]
        padded = torch.zeros(max(sizes), *own.shape[1:], dtype=own.dtype, device=device)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size].cpu() for part, size in zip(parts, sizes, strict=True)])


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_joined = itertools.count()


def _meeting_place() -> dict[str, Any]:
    """Where the ranks of this attempt find one another.

    torchrun keeps one key-value store over its restarts, in which a restarted rank may find the address of one
    that is dead (pytorch issue 167288). On one node all ranks know which attempt it is; on several they do not.
    The same holds of a group that this process has left.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": PrefixStore(f"attempt-{attempt}-{next(_joined)}", store), "rank": rank, "world_size": world}
