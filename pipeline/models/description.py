"""Self-describing weights: what a weights file is for, stored in it and in the model.json next to it.

With it a file can be loaded, exported or asked for predictions without the configuration that it was trained with.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import timm
import torch

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.types import Triple
from pipeline.models.build import NormalizedModel
from pipeline.models.weights import DESCRIPTION, load_weights, read_saved_weights


@dataclass(frozen=True)
class ModelDescription:
    """Everything that is needed to build a model, load its weights and prepare its input."""

    model: str
    """A timm model."""
    kwargs: dict[str, Any]
    """Arguments of `timm.create_model`, the input size among them where the model takes one."""
    classes: list[str]
    """Names, in the order of the logits."""
    size: int
    """Height and width of the input in pixels."""
    mean: Triple
    """Of the normalization, for inputs in [0, 1]."""
    std: Triple
    crop: float
    """Fraction of the resized image's short side that the evaluation's centre crop keeps."""
    heads: str
    """`mean`: the prediction is the mean of both heads' logits where there are two. `class`: the class head alone, as
    the distillation head was not trained."""

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Any, source: str) -> Self:
        """The inverse of `as_json`.

        Raises:
            PipelineError: fields are missing or unknown.
        """
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            raise PipelineError(
                f"{source}: the description of the model",
                expected=", ".join(cls.__dataclass_fields__),
                found=", ".join(values) if isinstance(values, dict) else "none",
                do="run the command that made the file again; weights of an earlier version carry no description",
            )
        values = dict(values)
        for key in ("mean", "std"):
            values[key] = tuple(values[key])
        return cls(**values)

    def build(self) -> NormalizedModel:
        """The model with fresh weights, in eval mode.

        Raises:
            UsageError: the installed timm does not have the model, or refuses its arguments.
        """
        try:
            model = timm.create_model(self.model, num_classes=len(self.classes), **self.kwargs)
        except Exception as error:  # each of timm's models has its own way to refuse arguments
            raise UsageError(
                f"model {self.model!r} with {self.kwargs}",
                expected="a model of the installed timm",
                found=f"{type(error).__name__}: {error}",
                do="install the timm version that trained it",
            ) from error
        return NormalizedModel(model, self.mean, self.std, joint=self.heads == "mean", name=self.model, kwargs=self.kwargs).eval()


def describe_model(
    model: NormalizedModel, classes: list[str], size: int, crop: float, distilled: bool = True
) -> ModelDescription:
    """The description of a model that `pipeline.models.build` made.

    Args:
        classes: names, in the order of the logits.
        size: height and width of its input in pixels.
        crop: of the evaluation's centre crop.
        distilled: whether a distillation head, if the model has one, was trained.
    """
    heads = "mean" if distilled or not model.distilled else "class"
    return ModelDescription(model.name, model.kwargs, classes, size, *model.mean_std, crop, heads)


def load_model(path: Path) -> tuple[NormalizedModel, ModelDescription, dict[str, Any]]:
    """A trained model from a weights file of this project alone.

    Returns:
        The model in eval mode on the CPU, its description, and all that the file says about its weights.

    Raises:
        PipelineError: the file is missing or damaged, or has no description.
    """
    if not path.exists():
        raise UsageError(f"{path}: no weights", expected="weights.safetensors of a student or teacher", found="nothing")
    state, about = read_saved_weights(path)
    description = ModelDescription.from_json(about.get(DESCRIPTION), str(path))
    model = description.build()
    load_weights(model.model, state, str(path))
    return model, description, about


class Classifier(torch.nn.Module):
    """A model with its normalization, for export: images in, logits out.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: NormalizedModel):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float32 RGB images (N, 3, size, size) in [0, 1] to float32 logits (N, classes)."""
        return self.model(images * 255)[0]
