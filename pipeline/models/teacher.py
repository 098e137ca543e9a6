"""The teacher: its weights, what identifies it, and its forward pass."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.functional import interpolate

from pipeline.common.errors import NotReady, PipelineError, UsageError
from pipeline.config.paths import NOT_NEEDED, teacher_folder
from pipeline.config.schema import Config, Teacher, TeacherLogits
from pipeline.config.validation import differences
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.models.compiling import compile_model
from pipeline.models.weights import (
    SUFFIXES,
    check_timm_tag,
    load_weights,
    read_external_weights,
    read_saved_weights,
    save_weights,
    weights_hash,
)


class TeacherForward:
    """A teacher as it is asked, for the store and in the loop alike.

    Its head computes in float32 whatever the precision: logits that were rounded to bfloat16 tie, and flip.
    """

    def __init__(self, teacher: NormalizedModel, settings: TeacherLogits, size: int | None = None):
        """`size` is the teacher's own input in pixels, where it is another than the views'."""
        self.settings, self.size = settings, size
        teacher.float32_head = True
        if settings.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        self.teacher = compile_model(teacher) if settings.compile else teacher

    def logits(self, pictures: torch.Tensor, slots: int) -> torch.Tensor:
        """Mixed pictures (N, 3, P, P) in 0..255, N a multiple of `slots`, to float32 logits (N, classes)."""
        settings, pictures = self.settings, resize_pictures(pictures, self.size)
        if settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        return teacher_logits(self.teacher, pictures, slots, settings.batch_groups, settings.precision == "bfloat16")


@torch.no_grad()
def teacher_logits(teacher: nn.Module, pictures: torch.Tensor, slots: int, groups: int, bf16: bool) -> torch.Tensor:
    """What the teacher answers: pictures (N, 3, P, P) in 0..255 to float32 logits (N, classes).

    Always in forwards of at most `groups` groups of `slots` pictures: offline and online use this one
    function, so on a CPU in float32 with one group a forward they agree to the bit.
    """
    device = pictures.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        logits = [teacher(part)[0].float() for part in pictures.split(slots * groups)]
    return torch.cat(logits)


def resize_pictures(pictures: torch.Tensor, size: int | None) -> torch.Tensor:
    """To the teacher's own size, where that is another: bilinear with antialias, on the device."""
    if size is None or pictures.shape[-1] == size:
        return pictures
    return interpolate(pictures, (size, size), mode="bilinear", antialias=True)


def pretrained_teacher(section: Teacher, weights: str, classes: int, notes: Path) -> NormalizedModel:
    """The teacher with `weights`, those of `teacher.weights`: a local file, or a timm tag (downloaded by timm).

    Args:
        notes: where the digests of foreign files are kept.

    Raises:
        UsageError, PipelineError: no such tag, no network, other shapes.
    """
    if weights.endswith(SUFFIXES):
        teacher = build_teacher(section, classes)
        load_weights(teacher.model, read_external_weights(Path(weights), notes), weights)
        return teacher
    if ":" not in weights:  # another hub's are known when they are fetched
        check_timm_tag(weights, classes)
    try:
        model = timm.create_model(weights, pretrained=True, num_classes=classes, **section.kwargs)
    except Exception as error:  # timm and the hub raise many kinds
        raise PipelineError(
            f"teacher.weights {weights!r}",
            expected="a timm tag that can be downloaded, or a local .safetensors or .pth file",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            do="check the tag and the network, or download the file and name it",
        ) from error
    return NormalizedModel(model, section.mean, section.std, joint=True)


def teacher_architecture(section: Teacher) -> dict[str, Any]:
    """What a teacher's weights are put into, as JSON values: other arguments may take the same weights."""
    own = section.model
    if section.weights and not section.weights.endswith(SUFFIXES):
        own = section.weights  # a timm tag, which names the model
    described = {"model": own, "kwargs": section.kwargs, "mean": section.mean, "std": section.std}
    return json.loads(json.dumps(described))


def describe_teacher(section: Teacher, teacher: NormalizedModel, size: int) -> dict[str, Any]:
    """All of a teacher that its answers depend on, as JSON values; part of a store's and of a run's identity.

    Args:
        size: pixels a side of what it sees.
    """
    heads = "mean" if hasattr(teacher.model, "head_dist") else "class"
    return {**teacher_architecture(section), "head": heads, "weights": weights_hash(teacher.model), "size": size}


def save_teacher(path: Path, section: Teacher, teacher: NormalizedModel) -> None:
    """Its weights, and what they belong into; `path` is written directly, so give a temporary one."""
    save_weights(path, teacher.model, teacher_architecture(section))


def load_teacher(config: Config, classes: int, device: torch.device, purpose: str = "train-student") -> NormalizedModel:
    """The published teacher that answers for a purpose, in eval mode on the device.

    Raises:
        PipelineError: it was not computed yet, or is another model's.
    """
    path, section = teacher_folder(config, purpose) / "weights.safetensors", config.teacher
    command = "pipeline teacher" + " --for finetune" * (purpose == "finetune")
    if not path.exists():
        raise NotReady(f"{path}: no teacher", do=f"run: {command}")
    state, about = read_saved_weights(path)
    if about == NOT_NEEDED:
        found = "a placeholder of dvc repro: no configured student is distilled"
        raise NotReady(f"{path}: no teacher", found=found, do=f"run: {command}")
    function = teacher_architecture(section)
    others = differences(about, function)
    if others:
        raise PipelineError(
            f"{path}: the teacher of another configuration",
            expected="weights that were published with the model and arguments of `teacher`",
            found="(there, here) " + "; ".join(others[:8]),
            do=f"run: {command}",
        )
    teacher = build_teacher(section.model_copy(update={"drop_path": 0.0, "model": function["model"]}), classes)
    load_weights(teacher.model, state, str(path))
    return teacher.to(device).eval()


def check_input_size(teacher: NormalizedModel, size: int, do: str) -> None:
    """Whether a teacher takes pictures of this size: position embeddings are of one size.

    Raises:
        UsageError: it does not; `do` is what to do then.
    """
    training = teacher.training
    try:
        with torch.no_grad():
            teacher.eval()(torch.zeros(1, 3, size, size, device=teacher.mean.device))
    except (AssertionError, RuntimeError, ValueError) as error:  # what timm's and torch's layers raise
        raise UsageError(
            f"the teacher with pictures of {size} px",
            expected="a model that takes them",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do=do,
        ) from error
    finally:
        teacher.train(training)
