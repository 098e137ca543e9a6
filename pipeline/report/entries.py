"""The models that an experiment compares: where their weights are, and how each is evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.common.code import source_digest
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.paths import FINETUNED, TEACHER, evaluated_models
from pipeline.config.schema import Config, Student, Training
from pipeline.config.types import is_custom_model
from pipeline.models.adapt import load_resized_weights
from pipeline.models.build import NormalizedModel, build_student
from pipeline.models.class_map import check_same_classes
from pipeline.models.teacher import load_teacher
from pipeline.models.weights import DESCRIPTION, read_saved_weights


@dataclass(frozen=True)
class Entry:
    """A model to evaluate, and how."""

    name: str
    model: str
    folder: Path
    """Holds its weights, its metrics and its training curve."""
    command: str
    """The subcommand that trains it."""
    size: int
    crop: float
    precision: str
    training: Training | None = None
    """How it is trained, if it is: a teacher may be used as it is."""
    student: Student | None = None
    """None for the teacher."""

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def distilled(self) -> bool:
        """Whether a distillation head was trained, if the model has one."""
        return self.student is not None and self.student.distillation != "none"


def list_entries(config: Config) -> list[Entry]:
    """The teacher, the students and the fine-tuned students, in the order of the tables.

    Raises:
        UsageError: there is no student.
    """
    entries = [_entry(config, name, folder) for name, folder in evaluated_models(config).items()]
    if not any(entry.student for entry in entries):
        raise UsageError("evaluate", expected="a student in `students` or `finetune.from`", found="none", do="list one")
    return entries


def _entry(config: Config, name: str, folder: Path) -> Entry:
    teacher, tuned, crop = config.teacher, config.finetune, config.evaluate.crop
    if name == TEACHER:
        model, size = teacher.title, config.teacher_size("train-student")
        return Entry(name, model, folder, "teacher", size, teacher.crop, teacher.precision, teacher)
    if name.endswith(FINETUNED):
        source = name.removesuffix(f"-{FINETUNED}")
        student, crop, command = (
            config.finetune_student(source),
            config.evaluate.crop_finetuned,
            f"finetune --student {source}",
        )
        return Entry(name, student.model, folder, command, tuned.size, crop, tuned.precision, tuned, student)
    student, size = config.student_named(name), config.recipe.size
    command = f"train-student --student {name}"
    return Entry(name, student.model, folder, command, size, crop, student.precision, student, student)


def require_weights(entries: list[Entry]) -> None:
    """Fail before hours of evaluation, not after.

    Raises:
        PipelineError: a model was not trained yet.
    """
    missing = [entry for entry in entries if not entry.weights.exists()]
    if missing:
        raise PipelineError(
            f"{missing[0].weights}: no weights",
            expected=f"weights of {', '.join(entry.name for entry in missing)}",
            found="no file",
            do=f"run: pipeline {missing[0].command} (or dvc repro)",
        )


def load_entry(
    config: Config, entry: Entry, classes: list[str], device: torch.device, size: int | None = None
) -> NormalizedModel:
    """Load an entry's model in eval mode on the device, at `size` pixels instead of its own if given.

    Raises:
        PipelineError: the weights are missing or damaged, or those of a different run from the metrics next to them, of
            other classes, or of a custom model whose source has changed.
    """
    if entry.student is None:
        return load_teacher(config, classes, device)
    model = build_student(entry.student, config.recipe, len(classes), size or entry.size)
    state, metadata = read_saved_weights(entry.weights)
    metrics = entry.folder / "metrics.json"
    if metrics.exists() and "run" in metadata and f'"{metadata["run"]}"' not in metrics.read_text(errors="replace"):
        raise PipelineError(
            f"{entry.weights}: weights of another run",
            expected=f"weights of the run named in {metrics}",
            found=f"run {metadata['run']}",
            do=f"run: pipeline {entry.command} (or dvc repro)",
        )
    _check_description(entry, metadata.get(DESCRIPTION, {}), classes)
    load_resized_weights(model, state, str(entry.weights))
    return model.to(device).eval()


def _check_description(entry: Entry, described: dict[str, Any], classes: list[str]) -> None:
    """Check that an entry's weights are of these classes and, if its model is a custom one, of its current source.

    Raises:
        PipelineError: they are not.
    """
    do = f"run: pipeline {entry.command} (or dvc repro)"
    if "classes" in described:
        check_same_classes(f"{entry.weights}: weights", described["classes"], classes, do)
    code = source_digest(entry.model) if is_custom_model(entry.model) else None
    if code != described.get("code"):
        raise PipelineError(
            f"{entry.weights}: weights of a model whose source has changed",
            expected=f"{entry.model} as it is now, SHA-256 {code}",
            found=f"SHA-256 {described.get('code')}",
            do=f"restore its source, or {do}",
        )
