"""Activation checkpointing: the backward pass computes most activations again instead of keeping them."""

from collections.abc import Iterable

from torch import nn

from pipeline.common.errors import UsageError
from pipeline.models.build import NormalizedModel

RUNNING_STATISTICS = ("running_mean", "running_var")


def checkpoint_activations(model: NormalizedModel, in_training: Iterable[nn.Module]) -> None:
    """Let a model keep only its blocks' inputs for the backward pass, as timm's `set_grad_checkpointing` does.

    Drop-path and dropout draw the same numbers again, so gradients stay the same.

    Args:
        in_training: the modules that are in training mode.

    Raises:
        UsageError: timm's model does not support it, or it has a batch norm in training mode, whose running statistics
            would be updated twice.
    """
    modules = (module for part in in_training for module in part.modules())
    norms = {type(module).__name__ for module in modules if any(hasattr(module, name) for name in RUNNING_STATISTICS)}
    if norms:
        raise _unsupported(model, "a model without batch norm", f"{', '.join(sorted(norms))}")
    try:
        model.model.set_grad_checkpointing(True)
    except Exception as error:  # AssertionError of timm's models; whatever a custom model raises
        raise _unsupported(model, "a model that supports it", str(error) or type(error).__name__) from error


def _unsupported(model: NormalizedModel, expected: str, found: str) -> UsageError:
    do = "set checkpoint_activations to false; accumulation also saves memory"
    return UsageError(f"checkpoint_activations: true with model {model.name!r}", expected=expected, found=found, do=do)
