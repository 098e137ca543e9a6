"""Pretrained weights of a teacher: read, and fitted to the classes of the index."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from pipeline.common.errors import PipelineError
from pipeline.config.schema import Teacher
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.models.weights import check_timm_tag, load_weights, read_external_weights

State = dict[str, torch.Tensor]


def classifier_modules(model: Any) -> list[nn.Module]:
    """The classifiers of a timm model: one, or that of each head."""
    found = model.get_classifier()
    return list(found) if isinstance(found, tuple | list) else [found]


def load_pretrained(section: Teacher, classes: int, checksums: Path) -> tuple[NormalizedModel, bool]:
    """The teacher with `teacher.weights`, and whether they fit: their classifier has as many classes.

    Otherwise its classifier is a new one, with initial weights drawn from the seed, and has yet to be trained.

    Args:
        checksums: folder for the checksums of external files.

    Raises:
        UsageError, PipelineError: no such tag, no network, weights of another model.
    """
    state = read_source(section, checksums)
    if section.timm_tag:
        section = section.model_copy(update={"model": section.timm_tag})
    teacher = build_teacher(section, classes)
    state, new = replace_classifiers(teacher.model, state, classes)
    load_weights(teacher.model, state, str(section.weights))
    return teacher, not new


def read_source(section: Teacher, checksums: Path) -> State:
    """The state dict of `teacher.weights`: a local file, or a timm tag, which timm downloads."""
    assert section.weights
    tag = section.timm_tag
    if tag is None:
        return read_external_weights(Path(section.weights), checksums)
    if ":" not in tag:  # another hub's are known when they are downloaded
        check_timm_tag(tag)
    try:
        return timm.create_model(tag, pretrained=True, **section.kwargs).state_dict()
    except Exception as error:  # timm and the hub raise many kinds
        raise PipelineError(
            f"teacher.weights {tag!r}",
            expected="a timm tag that can be downloaded, or a local .safetensors or .pth file",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            do="check the tag and the network, or download the file and name it",
        ) from error


def replace_classifiers(model: nn.Module, state: State, classes: int) -> tuple[State, list[str]]:
    """A state dict for `classes` classes: a classifier of another number, or none, is replaced by the model's own.

    Returns:
        The state dict, and the names of the parameters that are the model's own.
    """
    own, modules = model.state_dict(), classifier_modules(model)
    names = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if any(module is classifier for classifier in modules)
        for name in module.state_dict()
    ]
    new = [name for name in names if name not in state or len(state[name]) != classes]
    if new:  # both heads of a distilled model are trained together
        new = names
    return state | {name: own[name] for name in new}, new
