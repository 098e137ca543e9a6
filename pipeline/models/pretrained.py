"""Pretrained weights of teachers and students: read, and fitted to the model and the classes of the index."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from pipeline.common.errors import PipelineError
from pipeline.config.schema import Student, Teacher
from pipeline.models.adapt import convert_distillation_token, load_resized_weights
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.models.class_map import StateDict, are_other_classes, check_same_classes, class_numbers, select_classes
from pipeline.models.hub import missing_weights
from pipeline.models.weights import check_timm_tag, load_weights, read_description, read_external_weights


def classifier_modules(model: Any) -> list[nn.Module]:
    """The classifiers of a timm model: one, or that of each head. Empty for a model without `get_classifier`."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    return list(found) if isinstance(found, tuple | list) else [found]


def classifier_names(model: nn.Module) -> list[str]:
    """The names of the classifiers' parameters in the state dict."""
    modules = classifier_modules(model)
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if any(module is classifier for classifier in modules)
        for name in module.state_dict()
    ]


def output_names(model: nn.Module) -> list[str]:
    """The names of the parameters of the classifiers' last layers, whose dimension 0 is classes.

    A classifier may be more than a linear layer: LeViT's begins with a batch norm.
    """
    names = []
    for prefix, module in model.named_modules():
        if any(module is classifier for classifier in classifier_modules(model)):
            layers = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
            for name, layer in layers[-1:]:
                names += [".".join(filter(None, (prefix, name, part))) for part in layer.state_dict()]
    return names


def load_pretrained(section: Teacher, classes: Sequence[str], checksums: Path) -> tuple[NormalizedModel, bool]:
    """The teacher with `teacher.weights`, and whether they fit: their classifier has as many classes, or a class map.

    Otherwise its classifier is a new one, with initial weights drawn from the seed, and has yet to be trained.

    Args:
        classes: class names of the index.
        checksums: folder for the checksums of external files.

    Raises:
        UsageError: no such tag, or a class map for other classes.
        PipelineError: no network, weights of another model, or weights that were published for other classes or input.
    """
    state = read_source(section, checksums, **section.kwargs)
    teacher = build_teacher(section, len(classes))
    return teacher, fit_weights(section, teacher.model, state, classes)


def fit_weights(section: Teacher, model: nn.Module, state: StateDict, classes: Sequence[str]) -> bool:
    """Load `teacher.weights` into a model for the classes of the index; see `load_pretrained`."""
    source = str(section.weights)
    if section.class_map is not None:
        state = select_classes(state, output_names(model), class_numbers(section.class_map, classes), source)
    state, new = replace_classifiers(model, state)
    if not new:
        described = {}  # nothing is known of weights on the hub
        if section.architecture == section.timm_tag:
            described = _expected_input(model)
        elif section.timm_tag is None:
            described = read_description(Path(source))
        _check_published(section, source, described, classes)
    load_weights(model, state, source)
    return not new


def _expected_input(model: nn.Module) -> dict[str, list[float]]:
    """The mean and standard deviation that timm's weights of a model were trained with."""
    known = getattr(model, "pretrained_cfg", None) or {}
    return {key: list(known[key]) for key in ("mean", "std") if known.get(key)}


def _check_published(section: Teacher, source: str, described: dict[str, Any], classes: Sequence[str]) -> None:
    """Check that weights that are used as they are were trained for the same classes and the same input, in every head.

    Raises:
        PipelineError: they were not.
    """
    if section.class_map is None and "classes" in described:
        do = "set class_map: the number that each class of the index, in its order, has in the weights"
        check_same_classes(f"{source}: weights", described["classes"], classes, do)
    if described.get("heads") == "class":
        raise PipelineError(
            f"{source}: weights of a student whose distillation head was not trained",
            expected="trained heads, as a teacher predicts with the mean of both", found="a student without distillation",
            do="use a distilled student, or one without a distillation token",
        )  # fmt: skip
    for key in ("mean", "std"):
        own = list(getattr(section, key))
        if described.get(key, own) != own:
            raise PipelineError(
                f"{source}: weights of a model with another normalization",
                expected=f"{key} {own}, as configured for the teacher",
                found=f"{key} {described[key]}",
                do=f"set the teacher's {key} to the value found",
            )


def load_student_weights(section: Student, model: NormalizedModel, classes: Sequence[str], checksums: Path) -> list[str]:
    """Load `student.weights` into the student; see `fit_student_weights`.

    Args:
        classes: class names of the index. Heads are replaced if the file names different ones, even if equally many.

    Raises:
        UsageError: no such tag.
        PipelineError: no network, or weights of another model.
    """
    other = section.timm_tag is None and has_other_classes(Path(str(section.weights)), classes)
    return fit_student_weights(section, model, read_source(section, checksums), other)


def has_other_classes(weights: Path, classes: Sequence[str]) -> bool:
    """Whether a weights file names classes that differ from these; most files name none."""
    named = read_description(weights).get("classes")
    return isinstance(named, list) and are_other_classes(named, classes)


def fit_student_weights(section: Student, model: NormalizedModel, state: StateDict, other_classes: bool = False) -> list[str]:
    """Load a state dict into the student, with or without the distillation token, of any classes and resolution.

    Returns:
        The names of the parameters that keep their initial values: heads with a different number of classes, or with different classes.
    """
    state, new = replace_classifiers(model.model, convert_distillation_token(model.model, state), other_classes)
    load_resized_weights(model, state, str(section.weights))
    return new


def read_source(section: Teacher | Student, checksums: Path, **kwargs: Any) -> StateDict:
    """The state dict of a section's `weights`: a local file, or a timm tag, which timm downloads.

    Args:
        kwargs: arguments of the tag's model.
    """
    assert section.weights
    key, tag = f"{type(section).__name__.lower()}.weights", section.timm_tag
    if tag is None:
        return read_external_weights(Path(section.weights), checksums)
    if ":" not in tag:  # those of another hub are known only after a download
        check_timm_tag(tag, key)
    if missing := missing_weights(tag):
        raise _no_download(key, tag, missing)
    try:
        return timm.create_model(tag, pretrained=True, **kwargs).state_dict()
    except Exception as error:  # timm and the hub raise many kinds
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise _no_download(key, tag, found) from error


def _no_download(key: str, tag: str, found: str) -> PipelineError:
    return PipelineError(
        f"{key} {tag!r}",
        expected="a timm tag or hf-hub:OWNER/NAME that can be downloaded, or a local .safetensors or .pth file",
        found=found,
        do="check the tag and the network, or download the file and name it",
    )


def replace_classifiers(model: nn.Module, state: StateDict, other_classes: bool = False) -> tuple[StateDict, list[str]]:
    """A state dict for the model's classes: a missing classifier, or one of a different size, is replaced by the model's own.

    Args:
        other_classes: replace it even if the size is the same.

    Returns:
        The state dict, and the names of the parameters that are the model's own.

    Raises:
        PipelineError: other classes, and the model does not say which is its classifier.
    """
    own, names = model.state_dict(), classifier_names(model)
    if other_classes and not names:
        raise PipelineError("weights whose classes differ from the index's", found="a model without it", do="add that method",
                            expected="a model with get_classifier(), whose classifier can be replaced")  # fmt: skip
    new = [name for name in names if name not in state or state[name].shape != own[name].shape]
    if new or other_classes:  # both heads of a distilled model are trained together
        new = names
    return state | {name: own[name] for name in new}, new
