"""Offline distillation of DeiT: a teacher's predictions are computed once, students train from them.

The public Python interface is what `__all__` lists, described in docs/python.md. It is imported on first use, because
`import pipeline` must not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api.batches import Batches, StudentBatch, open_batches
    from pipeline.common.errors import PipelineError
    from pipeline.config.params import load as load_config
    from pipeline.training.losses import base_loss, hard_loss, sampled_loss, soft_loss

__version__ = "0.1.0"
__all__ = [
    "Batches", "PipelineError", "StudentBatch", "base_loss", "hard_loss", "load_config", "open_batches",
    "sampled_loss", "soft_loss",
]  # fmt: skip

_PUBLIC = {
    "Batches": ("pipeline.api.batches", "Batches"),
    "PipelineError": ("pipeline.common.errors", "PipelineError"),
    "StudentBatch": ("pipeline.api.batches", "StudentBatch"),
    "base_loss": ("pipeline.training.losses", "base_loss"),
    "hard_loss": ("pipeline.training.losses", "hard_loss"),
    "load_config": ("pipeline.config.params", "load"),
    "open_batches": ("pipeline.api.batches", "open_batches"),
    "sampled_loss": ("pipeline.training.losses", "sampled_loss"),
    "soft_loss": ("pipeline.training.losses", "soft_loss"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
