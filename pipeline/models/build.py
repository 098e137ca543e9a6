"""Build teachers and students with timm."""

import difflib
from typing import Any

import timm
import torch
from timm.layers.weight_init import trunc_normal_
from torch import nn

from pipeline.common.errors import UsageError
from pipeline.config.schema import Recipe, Student, Teacher
from pipeline.config.types import Triple
from pipeline.models.linear import convert_linear


class NormalizedModel(nn.Module):
    """A timm model that normalises its input itself and returns the logits of two heads.

    A model without a distillation head returns its logits twice, so a plain student can be distilled (Table 3's "usual"
    and "hard" rows). So does a `joint` one, such as a teacher: the mean of its heads if it has two, as timm does.
    """

    model: Any  # a type checker takes timm's models for Modules without methods
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, mean: Triple, std: Triple, joint: bool = False, name: str = "",
        kwargs: dict[str, Any] | None = None,
    ):  # fmt: skip
        """`name` and `kwargs` are those that timm.create_model made the model with, for its description."""
        super().__init__()
        self.name, self.kwargs, self.mean_std = name, kwargs or {}, (mean, std)
        convert_linear(model)
        self.model = model
        self.float32_head = False
        """Whether pooling and classifier compute in float32 even under autocast."""
        self.distilled = hasattr(model, "head_dist") and not joint
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class and distillation logits (N, classes) of float pictures (N, 3, P, P) in 0..255."""
        features = self.model.forward_features((pictures - self.mean) / self.std)
        if not self.float32_head:
            return self.heads(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.heads(features.float())

    def heads(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class and distillation logits (N, classes) of the features, in the model's own layout."""
        if not self.distilled:
            logits = self.model.forward_head(features)  # timm's gives the mean of two heads
            return logits, logits
        # timm averages the heads in eval mode; here both are needed in every mode
        tokens = self.model.head_drop(features[:, :2])
        return self.model.head(tokens[:, 0]), self.model.head_dist(tokens[:, 1])


def build(
    section: Teacher | Student, classes: int, mean: Triple, std: Triple, *, size: int | None = None, joint: bool = False
) -> NormalizedModel:
    """Build the timm model that a teacher or student section names, with initial weights drawn from its seed.

    Args:
        size: input height and width in pixels, for models with position embeddings (deit_*).
        joint: average two heads; see NormalizedModel.

    Raises:
        UsageError: timm knows no such model, or it does not take these kwargs.
    """
    kwargs: dict[str, Any] = {"drop_rate": section.dropout}
    if size is not None:
        # dropout as in timm 0.3.2, which DeiT pins: after position embeddings, attention and MLP, not before the heads
        kwargs = {"img_size": size, "pos_drop_rate": section.dropout, "proj_drop_rate": section.dropout}
    kwargs |= section.kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        try:
            model = timm.create_model(
                section.model,
                num_classes=classes,
                drop_path_rate=section.drop_path,
                **kwargs,
            )
        except Exception as error:  # timm's models reject arguments in many ways
            raise _unsuitable(section.model, kwargs, error) from error
        if hasattr(model, "cls_token"):
            trunc_normal_(model.cls_token, std=0.02)  # as in DeiT (timm 0.3.2); timm now uses 1e-6
    own = {"img_size": size} if size is not None else {}
    return NormalizedModel(model, mean, std, joint, section.model, own | section.kwargs)


def _unsuitable(model: str, kwargs: dict[str, Any], error: Exception) -> UsageError:
    found = f"{type(error).__name__}: {error}"
    if timm.is_model(model):
        return UsageError(
            f"model {model!r} with {kwargs}", expected="arguments that it accepts", found=found, do="correct kwargs"
        )
    close = difflib.get_close_matches(model, timm.list_models(), n=5, cutoff=0.5)
    near = f", such as {', '.join(close)}" if close else ""
    return UsageError(
        f"model {model!r}", expected=f"the name of a timm model{near}", found=found, do="correct the name"
    )


def build_student(section: Student, recipe: Recipe, classes: int, size: int) -> NormalizedModel:
    """Build a deit_* student for `size` pixels, normalised with the recipe's mean and std."""
    return build(section, classes, recipe.mean, recipe.std, size=size)


def build_teacher(section: Teacher, classes: int) -> NormalizedModel:
    """Build the teacher, normalised with its own mean and std, its weights untrained."""
    return build(section, classes, section.mean, section.std, joint=True)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())
