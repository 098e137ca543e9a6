"""Self-describing weights: what a weights file is for, stored in it and in the model.json next to it.

With it a file can be loaded, exported or asked for predictions without the configuration that it was trained with.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any, Self

import timm

from pipeline.common.code import source_digest, source_file
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.types import CUSTOM_MODEL, Triple, is_custom_model
from pipeline.models.build import CustomModel, NormalizedModel, build_custom
from pipeline.models.ensemble import Ensemble
from pipeline.models.weights import DESCRIPTION, load_weights, read_saved_weights


@dataclass(frozen=True)
class ModelDescription:
    """Everything that is needed to build a model, load its weights and prepare its input."""

    model: str
    """A timm model; or a custom model, module:function; or a name for several `members`."""
    kwargs: dict[str, Any]
    """Arguments of `timm.create_model` or the function, the input size among them where the model takes one."""
    classes: list[str]
    """Class names, in the order of the logits."""
    size: int
    """Height and width of the input in pixels."""
    mean: Triple
    """Mean by which inputs in [0, 1] are normalized."""
    std: Triple
    crop: float
    """Fraction of the resized image's short side that the evaluation's centre crop keeps."""
    heads: str
    """`mean`: the prediction is the mean of both heads' logits where there are two. `class`: the class head alone, as
    the distillation head was not trained."""
    code: str | None = None
    """SHA-256 of the source file of a custom model."""
    members: list[dict[str, Any]] | None = None
    """For an ensemble: model, kwargs, mean, std, size and code of each, by the same rules; size null: that of the
    ensemble's input."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values, without optional ones that are not used."""
        fields = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in fields.items() if value is not None}

    def custom_models(self) -> list[str]:
        """The custom models that it names."""
        named = [self.model, *(str(member["model"]) for member in self.members or [])]
        return [name for name in named if re.fullmatch(CUSTOM_MODEL, name)]

    @classmethod
    def from_json(cls, values: Any, source: str) -> Self:
        """The inverse of `as_json`.

        Raises:
            PipelineError: fields are missing or unknown.
        """
        fields = cls.__dataclass_fields__
        required = {name for name, field in fields.items() if field.default is MISSING}
        if not isinstance(values, dict) or not required <= values.keys() <= fields.keys():
            raise PipelineError(
                f"{source}: the description of the model",
                expected=", ".join(name for name in fields if name in required),
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
            UsageError: the installed timm does not have the model, or refuses its arguments; no such function.
            PipelineError: the source of a custom model has changed.
        """
        if not self.members:
            joint = self.heads == "mean"
            return _build(self.model, self.kwargs, len(self.classes), self.mean, self.std, self.code, joint).eval()
        models = [
            _build(each["model"], each["kwargs"], len(self.classes), each["mean"], each["std"], each["code"], True)
            for each in self.members
        ]
        return Ensemble(models, [each["size"] for each in self.members], self.model).eval()


def _build(
    name: str, kwargs: dict[str, Any], classes: int, mean: Triple, std: Triple, code: str | None, joint: bool
) -> NormalizedModel:
    """A model with fresh weights; see ModelDescription."""
    if is_custom_model(name):
        if source_digest(name) != code:
            raise PipelineError(
                f"model {name!r}", expected=f"the source that it was trained with, SHA-256 {code}",
                found=f"{source_file(name)}: {source_digest(name)}", do="restore that file, or train the model again",
            )  # fmt: skip
        return build_custom(name, kwargs, classes, mean, std)
    try:
        model = timm.create_model(name, num_classes=classes, **kwargs)
    except Exception as error:  # each of timm's models has its own way to refuse arguments
        raise UsageError(
            f"model {name!r} with {kwargs}",
            expected="a model of the installed timm",
            found=f"{type(error).__name__}: {error}",
            do="install the timm version that trained it",
        ) from error
    return NormalizedModel(model, mean, std, joint=joint, name=name, kwargs=kwargs)


def describe_model(
    model: NormalizedModel, classes: list[str], size: int, crop: float, distilled: bool = True
) -> ModelDescription:
    """The description of a model that `pipeline.models` built.

    Args:
        classes: names, in the order of the logits.
        size: height and width of its input in pixels.
        crop: of the evaluation's centre crop.
        distilled: whether a distillation head, if the model has one, was trained.
    """
    heads = "mean" if distilled or not model.distilled else "class"
    members = None
    if isinstance(model, Ensemble):
        pairs = zip(model.members, model.sizes, strict=True)
        members = [_describe_member(member, own_size) for member, own_size in pairs]
    code = source_digest(model.name) if isinstance(model, CustomModel) else None
    return ModelDescription(model.name, model.kwargs, classes, size, *model.mean_std, crop, heads, code, members)


def _describe_member(model: NormalizedModel, size: int | None) -> dict[str, Any]:
    mean, std = model.mean_std
    code = source_digest(model.name) if isinstance(model, CustomModel) else None
    return {"model": model.name, "kwargs": model.kwargs, "mean": mean, "std": std, "size": size, "code": code}


def load_model(
    path: Path, custom_models: Callable[[], Collection[str]] = tuple
) -> tuple[NormalizedModel, ModelDescription, dict[str, Any]]:
    """A trained model from a weights file of this project alone.

    Args:
        custom_models: the custom models that may be imported. A file from elsewhere may name any function, so it is
            not enough that the file names one.

    Returns:
        The model in eval mode on the CPU, its description, and all that the file says about its weights.

    Raises:
        PipelineError: the file is missing or damaged, or has no description.
        UsageError: it needs a function that is not among `custom_models`.
    """
    if not path.exists():
        raise UsageError(
            f"{path}: no weights", expected="weights.safetensors of a student or teacher", found="nothing", do="correct the path"
        )
    state, about = read_saved_weights(path)
    description = ModelDescription.from_json(about.get(DESCRIPTION), str(path))
    if named := description.custom_models():
        _check_allowed(path, named, custom_models())
    model = description.build()
    load_weights(model.model, state, str(path))
    return model, description, about


def _check_allowed(path: Path, named: list[str], allowed: Collection[str]) -> None:
    if foreign := [name for name in named if name not in allowed]:
        raise UsageError(
            f"{path}: a model of {foreign[0]}",
            expected="a timm model, or a function that the configuration names too, since it is imported and run",
            found="a configuration that does not name it",
            do="choose the experiment's configuration with --config, if you trust this code",
        )
