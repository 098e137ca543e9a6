"""Adapting weights to another resolution or number of classes."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate

from pipeline.common.errors import PipelineError, UsageError
from pipeline.models.build import NormalizedModel
from pipeline.models.weights import load_weights


def resize_position_embedding(embedding: torch.Tensor, grid: int, prefix: int) -> torch.Tensor:
    """Resize position embeddings (1, prefix + n * n, D) to a grid x grid of patches as DeiT does.

    Bicubic without antialiasing, prefix tokens unchanged (DeiT, main.py; timm's resample_abs_pos_embed antialiases).
    """
    kept, patches = embedding[:, :prefix], embedding[:, prefix:]
    old = round(patches.shape[1] ** 0.5)
    patches = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = interpolate(patches, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([kept, patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def load_resized_weights(model: NormalizedModel, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a student's weights from another resolution; only the position embeddings change.

    Raises:
        PipelineError: they are another model's, or other tensors depend on the resolution.
    """
    grid = getattr(getattr(model.model, "patch_embed", None), "grid_size", None)
    own, given = getattr(model.model, "pos_embed", None), state.get("pos_embed")
    if grid is not None and own is not None and given is not None and own.ndim == given.ndim == 3:
        prefix = own.shape[1] - grid[0] * grid[1]
        patches = given.shape[1] - prefix
        if patches > 0 and math.isqrt(patches) ** 2 == patches:  # otherwise load_weights reports another model
            state = state | {"pos_embed": resize_position_embedding(given, grid[0], prefix)}
    own_shapes, shapes = (
        {name: tuple(each.shape) for name, each in part.items()} for part in (model.model.state_dict(), state)
    )
    if shapes.keys() == own_shapes.keys() and shapes != own_shapes:
        others = [f"{name} {own} and {shapes[name]}" for name, own in own_shapes.items() if own != shapes[name]]
        raise PipelineError(
            f"{source}: weights for another input size, number of classes or model",
            expected=f"the shapes of the configured {type(model.model).__name__}; only position embeddings are resized",
            found="(configured, file) " + "; ".join(others[:3]),
            do="use the input size that they were trained at, or name the file that belongs to this model",
        )
    load_weights(model.model, state, source)


def convert_distillation_token(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a DeiT's weights between models with and without a distillation token; other weights are unchanged.

    A model without the token drops it, its position embedding and its head. In a model that has one, all three start as
    copies of the class token's: both heads then begin with what the class head knows, and differ after the first step,
    as one learns from labels and the other from the teacher.
    """
    wanted, present = hasattr(model, "dist_token"), "dist_token" in state
    if wanted == present or not {"cls_token", "pos_embed"} <= state.keys():
        return state
    positions = state["pos_embed"]
    if present:
        kept = {
            name: each for name, each in state.items() if name != "dist_token" and not name.startswith("head_dist.")
        }
        return kept | {"pos_embed": torch.cat([positions[:, :1], positions[:, 2:]], 1)}
    if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        return state  # the class token has no position embedding, as in DeiT III
    heads = {f"head_dist.{part}": state[f"head.{part}"] for part in ("weight", "bias") if f"head.{part}" in state}
    tokens = {"dist_token": state["cls_token"], "pos_embed": torch.cat([positions[:, :1], positions], 1)}
    return state | heads | tokens


def fixres_modules(model: Any) -> list[nn.Module]:
    """Modules of a convnet that FixRes fine-tunes: the classifier and the last batch norm.

    If the shortcut of the last block has a batch norm too, both norms whose sum is the output.

    Raises:
        UsageError: the model has no batch norm.
    """
    norms = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not norms or not hasattr(model, "get_classifier"):
        raise UsageError(
            f"model {type(model).__name__}", expected="a convnet of timm's with batch norms", found="none",
            do="set teacher_finetune.epochs to 0: there is nothing to adapt",
        )  # fmt: skip
    last = norms[-2:] if "downsample" in norms[-1][0] else norms[-1:]
    return [model.get_classifier(), *(part for _, part in last)]
