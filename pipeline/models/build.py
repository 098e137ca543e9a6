"""Build teachers and students with timm."""

import difflib
import re
from typing import Any

import timm
import torch
from timm.layers.weight_init import trunc_normal_
from torch import nn

from pipeline.common.code import import_function
from pipeline.common.errors import UsageError
from pipeline.config.schema import Recipe, Student, Teacher
from pipeline.config.types import Triple, is_custom_model
from pipeline.models.linear import convert_linear

INNER_DROPOUT = {"pos_drop_rate", "proj_drop_rate"}
"""timm's arguments for dropout after position embeddings, and after attention and MLP."""


class NormalizedModel(nn.Module):
    """A timm model that normalizes its input itself and returns the logits of two heads.

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
        self.distilled = hasattr(model, "dist_token") and not joint  # LeViT has a second head, but no token for it
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


class CustomModel(NormalizedModel):
    """A custom model, from pictures to logits; it is distilled through its output, as through a class head.

    Under autocast the entire model computes in the lower precision, its classifier included.
    """

    def __init__(self, model: nn.Module, mean: Triple, std: Triple, name: str, kwargs: dict[str, Any], classes: int):
        super().__init__(model, mean, std, True, name, kwargs)
        self.classes = classes

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, classes) of float pictures (N, 3, P, P) in 0..255, twice: there is one head.

        Raises:
            UsageError: the output has a different shape.
        """
        logits = self.model((pictures - self.mean) / self.std)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] != self.classes:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UsageError(
                f"the output of model {self.name!r}", expected=f"logits: a tensor of shape (images, {self.classes})",
                found=found, do="return only the logits, num_classes of them per image",
            )  # fmt: skip
        return logits, logits


def build_custom(model: str, kwargs: dict[str, Any], classes: int, mean: Triple, std: Triple) -> CustomModel:
    """Build a custom model: FUNCTION(num_classes=classes, **kwargs), for a dotted path MODULE:FUNCTION.

    Raises:
        UsageError: there is no such function, or it does not return a module for these arguments.
    """
    function = import_function(model, "model")
    try:
        built = function(num_classes=classes, **kwargs)
    except Exception as error:  # whatever its code raises
        built, found = None, f"{type(error).__name__}: {error}"
    else:
        found = type(built).__name__
    if not isinstance(built, nn.Module):
        raise UsageError(
            f"model {model!r}", expected=f"a torch.nn.Module from {model}(num_classes={classes}, **{kwargs})",
            found=found, do="correct the function or kwargs",
        )  # fmt: skip
    return CustomModel(built, mean, std, model, kwargs, classes)


def build(
    section: Teacher | Student, classes: int, mean: Triple, std: Triple, *, size: int | None = None, joint: bool = False
) -> NormalizedModel:
    """Build the timm model that a teacher or student section names, with initial weights drawn from its seed.

    Args:
        size: input height and width in pixels, for models that are built for one: ViT, Swin, MLP-Mixer, ...
        joint: average two heads; see NormalizedModel.

    Raises:
        UsageError: timm knows no such model, or it does not take these kwargs.
    """
    if is_custom_model(section.model):
        return _build_custom_section(section, classes, mean, std)
    settings: dict[str, Any] = {"drop_rate": section.dropout}
    if size is not None:
        # dropout as in timm 0.3.2, which DeiT pins: after position embeddings, attention and MLP, not before the heads
        settings = {"img_size": size, "pos_drop_rate": section.dropout, "proj_drop_rate": section.dropout}
    settings["drop_path_rate"] = section.drop_path
    with torch.random.fork_rng(devices=[]):
        model = _create(section, classes, settings)
        if getattr(model, "cls_token", None) is not None:
            trunc_normal_(model.cls_token, std=0.02)  # as in DeiT (timm 0.3.2); timm now uses 1e-6
    own = {"img_size": size} if "img_size" in settings else {}
    return NormalizedModel(model, mean, std, joint, section.model, own | section.kwargs)


def _build_custom_section(section: Teacher | Student, classes: int, mean: Triple, std: Triple) -> CustomModel:
    """Build the custom model that a section names, with initial weights drawn from its seed by torch."""
    for key in ("dropout", "drop_path"):
        if value := getattr(section, key):
            raise UsageError(
                f"model {section.model!r}", expected=f"{key}: 0 with a custom model, to which it is not passed",
                found=f"{value:g}", do=f"set {key} to 0, and pass what the function takes in kwargs",
            )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        return build_custom(section.model, section.kwargs, classes, mean, std)


def _create(section: Teacher | Student, classes: int, settings: dict[str, Any]) -> nn.Module:
    """Create the timm model, without those settings that it has no argument for.

    Args:
        settings: arguments that follow from the section; those that the model takes are left in it.
    """
    while True:
        torch.manual_seed(section.seed)
        kwargs = settings | section.kwargs
        try:
            return timm.create_model(section.model, num_classes=classes, **kwargs)
        except Exception as error:  # timm's models reject arguments in many ways
            unknown = re.search(r"unexpected keyword argument\D{1,6}'(\w+)'", str(error))
            if unknown is None or unknown[1] not in settings.keys() - section.kwargs.keys():
                raise _unsuitable(section.model, kwargs, error) from error
            _omit(section, unknown[1], settings)


def _omit(section: Teacher | Student, argument: str, settings: dict[str, Any]) -> None:
    """Remove a setting that the model has no argument for; dropout is then applied before the classifier only."""
    value = settings.pop(argument)
    if argument in INNER_DROPOUT:
        for name in INNER_DROPOUT & settings.keys():
            del settings[name]
        settings["drop_rate"] = value
    elif value and argument != "img_size":
        key = {"drop_path_rate": "drop_path", "drop_rate": "dropout"}[argument]
        raise UsageError(
            f"model {section.model!r}", expected=f"{key}: 0, as the model does not support it", found=value, do=f"set {key} to 0"
        )


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
    """Build a student for `size` pixels, normalized with the recipe's mean and std."""
    return build(section, classes, recipe.mean, recipe.std, size=size)


def build_teacher(section: Teacher, classes: int) -> NormalizedModel:
    """Build the teacher, normalized with its own mean and std, its weights untrained."""
    section = section.model_copy(update={"model": section.architecture})
    return build(section, classes, section.mean, section.std, joint=True)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())
