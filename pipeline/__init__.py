"""Offline distillation of DeiT: a teacher's predictions are computed once, students train from them.

The public Python interface is what `__all__` lists, described in docs/python.md. It is imported on first use, because
`import pipeline` must not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api.batches import Batches, StudentBatch, open_batches
    from pipeline.common.errors import PipelineError
    from pipeline.config.params import load_config
    from pipeline.training.losses import base_loss, hard_loss, sampled_loss, soft_loss

__version__ = "0.1.0"
__all__ = [
    "Batches", "PipelineError", "StudentBatch", "base_loss", "hard_loss", "load_config", "open_batches",
    "sampled_loss", "soft_loss",
]  # fmt: skip

_MODULES = {
    "pipeline.api.batches": ("Batches", "StudentBatch", "open_batches"),
    "pipeline.common.errors": ("PipelineError",),
    "pipeline.config.params": ("load_config",),
    "pipeline.training.losses": ("base_loss", "hard_loss", "sampled_loss", "soft_loss"),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
