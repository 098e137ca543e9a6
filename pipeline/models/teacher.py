"""The teacher: its weights, what identifies it, and its forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import PatchEmbed  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from pipeline.common.arithmetic import autocast
from pipeline.common.errors import NotReady, PipelineError, UsageError
from pipeline.config.paths import NOT_NEEDED, teacher_folder
from pipeline.config.schema import Config, Teacher, TeacherLogits
from pipeline.config.validation import differences
from pipeline.models.build import CustomModel, NormalizedModel, build_teacher
from pipeline.models.class_map import check_same_classes
from pipeline.models.compiling import compile_model
from pipeline.models.ensemble import Ensemble, join, resize_pictures
from pipeline.models.provenance import teacher_architecture
from pipeline.models.weights import (
    DESCRIPTION,
    TRAINED,
    load_weights,
    read_saved_weights,
    save_weights,
    weights_hash,
)

PREDICTIONS_VERSION = 1  # bump when the same weights give other predictions for a view; identities have it from 2 on


class TeacherForward:
    """The teacher's forward pass, the same for the store and for online distillation.

    Its head computes in float32 in every precision: rounded to bfloat16, logits tie and the argmax flips.
    """

    def __init__(self, teacher: NormalizedModel, settings: TeacherLogits, size: int | None = None):
        """`size` is the height and width of the teacher's input; views of another size are resized. None: any."""
        self.settings, self.size = settings, size
        for model in teacher.members if isinstance(teacher, Ensemble) else [teacher]:
            model.float32_head = True
        if settings.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        self.teacher = compile_model(teacher) if settings.compile else teacher

    def logits(self, pictures: torch.Tensor, slots: int) -> torch.Tensor:
        """Logits, float32 (N, classes), of mixed pictures (N, 3, P, P) in 0..255; N is a multiple of `slots`."""
        settings, pictures = self.settings, resize_pictures(pictures, self.size)
        if settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        return teacher_logits(self.teacher, pictures, slots, settings.batch_groups, settings.precision)


@torch.no_grad()
def teacher_logits(teacher: nn.Module, pictures: torch.Tensor, slots: int, groups: int, precision: str) -> torch.Tensor:
    """Logits, float32 (N, classes), of pictures (N, 3, P, P) in 0..255.

    Each forward pass takes at most `groups` groups of `slots` pictures. Labelling and online distillation share this
    function, so on a CPU, in float32 and with one group per pass, they agree to the bit.
    """
    with autocast(pictures.device.type, precision):
        logits = [teacher(part)[0].float() for part in pictures.split(slots * groups)]
    return torch.cat(logits)


def describe_teacher(section: Teacher, teacher: NormalizedModel, size: int) -> dict[str, Any]:
    """Everything about a teacher that its predictions depend on, as JSON values: part of stores' and runs' identities.

    Args:
        size: height and width of its input in pixels.
    """
    heads = "mean" if hasattr(teacher.model, "head_dist") else "class"
    version = {"predictions_version": PREDICTIONS_VERSION} if PREDICTIONS_VERSION > 1 else {}
    return {**teacher_architecture(section), "head": heads, "weights": weights_hash(teacher.model), "size": size, **version}


def save_teacher(
    path: Path,
    section: Teacher,
    teacher: NormalizedModel,
    description: dict[str, Any] | None = None,
    trained: dict[str, Any] | None = None,
) -> None:
    """Save weights and architecture; `path` is written directly, so pass a temporary one.

    Args:
        trained: how, see `pipeline.training.origin`; None: the pipeline did not train it.
    """
    about = {DESCRIPTION: description or {}} | ({TRAINED: trained} if trained else {})
    save_weights(path, teacher.model, teacher_architecture(section) | about)


def load_teacher(
    config: Config, classes: Sequence[str], device: torch.device, purpose: str = "train-student"
) -> NormalizedModel:
    """Load the published teacher for a purpose, in eval mode on the device.

    Args:
        classes: names of the index, which the teacher must have been published with.

    Raises:
        NotReady: it has not been published.
        PipelineError: it belongs to another configuration, or is damaged.
    """
    path, section = teacher_folder(config, purpose) / "weights.safetensors", config.teacher
    command = "pipeline teacher" + " --for finetune" * (purpose == "finetune")
    if not path.exists():
        raise NotReady(f"{path}: no teacher", do=f"run: {command}")
    state, metadata = read_saved_weights(path)
    if metadata == NOT_NEEDED:
        found = "a placeholder of dvc repro: no configured student is distilled"
        raise NotReady(f"{path}: no teacher", found=found, do=f"run: {command}")
    architecture = teacher_architecture(section)
    described = metadata.get(DESCRIPTION)
    published = {key: value for key, value in metadata.items() if key not in (DESCRIPTION, TRAINED)}
    if others := differences(published, architecture):
        raise PipelineError(
            f"{path}: the teacher of another configuration",
            expected="weights that were published with the model and arguments of `teacher`",
            found="(published, configured) " + "; ".join(others[:8]),
            do=f"run: {command}",
        )
    if described:
        check_same_classes(f"{path}: a teacher", described["classes"], classes, f"run: {command}")
    members = [member.model_copy(update={"drop_path": 0.0}) for member in section.members]
    teacher = join(section, [build_teacher(member, len(classes)) for member in members])
    load_weights(teacher.model, state, str(path))
    return teacher.to(device).eval()


def check_input_size(model: NormalizedModel, size: int, do: str, name: str = "the teacher") -> None:
    """Check that a model accepts pictures of this size, of which its patches cover everything.

    Position embeddings have a fixed size; and timm's patch embedding ignores what is left beside the last whole patch.

    Raises:
        UsageError: it does not; `do` says what to do.
    """
    embedding, side = getattr(model.model, "patch_embed", None), 1
    if isinstance(embedding, PatchEmbed) and not embedding.dynamic_img_pad:
        side = int(embedding.patch_size[0])
    usual = getattr(model.model, "pretrained_cfg", {}).get("input_size", ())  # SigLIP's is not a multiple either
    if size % side and size not in usual:
        raise UsageError(
            f"{name} with pictures of {size} px", expected=f"a multiple of its patch size, {side}",
            found=f"{size % side} rows and columns that it would ignore", do=do,
        )  # fmt: skip
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=model.mean.device))
    except PipelineError:
        raise
    except Exception as error:
        # those of timm's and torch's layers; a custom model may raise anything
        if not isinstance(error, AssertionError | RuntimeError | ValueError) and not isinstance(model, CustomModel):
            raise
        raise UsageError(
            f"{name} with pictures of {size} px",
            expected="a model that accepts them",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do=do,
        ) from error
    finally:
        model.train(training)
