"""The model as a training step calls it, and which of its modules are trained."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.common.distributed import Rank
from pipeline.models.compiling import compile_model
from pipeline.training.run import Run

SYNC_BUFFERS = next(
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in signature(DistributedDataParallel).parameters
)
"""DDP's argument for buffers in the forward pass; the second is deprecated where there is the first."""


def set_trainable(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Let only these modules have gradients; none: the entire model."""
    model.requires_grad_(not modules)
    for module in modules:
        module.requires_grad_(True)


def parallel_model(run: Run, rank: Rank) -> nn.Module:
    """The model under DDP where there are several ranks, compiled where that is asked for."""
    model: nn.Module = run.model
    if rank.world_size > 1:
        # without distillation head_dist gets no gradient
        unused = run.model.distilled and not run.distilled
        # no buffers: rank 0's statistics of batch norm are kept, which no other rank changes
        buffers: dict[str, Any] = {SYNC_BUFFERS: False}
        model = DistributedDataParallel(model, find_unused_parameters=unused, **buffers)
    # after DDP: the graph is then split at its buckets, so that gradients are reduced during the backward pass
    return compile_model(model) if run.settings.compile else model
