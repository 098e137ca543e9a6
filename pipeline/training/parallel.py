"""The model as a training step calls it, and which of its modules are trained."""

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.common.distributed import Rank
from pipeline.models.compiling import compile_model
from pipeline.training.run import Run


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
        model = DistributedDataParallel(model, find_unused_parameters=unused, broadcast_buffers=False)
    # after DDP: the graph is then split at its buckets, so that gradients are reduced during the backward pass
    return compile_model(model) if run.settings.compile else model
