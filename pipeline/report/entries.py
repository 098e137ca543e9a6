"""The models that an experiment compares: where their weights are, and how each is evaluated."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.common.errors import PipelineError
from pipeline.config.paths import FINETUNED, TEACHER, evaluated_models
from pipeline.config.schema import Config, Student
from pipeline.models.adapt import load_resized_weights
from pipeline.models.build import NormalizedModel, build_student
from pipeline.models.teacher import load_teacher
from pipeline.models.weights import read_saved_weights

TRUTH = "truth"


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
    """The teacher, the students and the fine-tuned students, in the order of the tables."""
    return [_entry(config, name, folder) for name, folder in evaluated_models(config).items()]


def _entry(config: Config, name: str, folder: Path) -> Entry:
    teacher, tuned, crop = config.teacher, config.finetune, config.evaluate.crop
    if name == TEACHER:
        model, size = teacher.weights or teacher.model, config.teacher_size("train-student")
        return Entry(name, model, folder, "teacher", size, teacher.crop, teacher.precision)
    if name.endswith(FINETUNED):
        source = name.removesuffix(f"-{FINETUNED}")
        student, crop = config.finetune_student(source), config.evaluate.crop_finetuned
        return Entry(name, student.model, folder, f"finetune --student {source}", tuned.size, crop, tuned.precision, student)
    student, size = config.student_named(name), config.recipe.size
    return Entry(name, student.model, folder, f"train-student --student {name}", size, crop, student.precision, student)


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


def load_model(
    config: Config, entry: Entry, classes: int, device: torch.device, size: int | None = None
) -> NormalizedModel:
    """Load an entry's model in eval mode on the device, at `size` pixels instead of its own if given.

    Raises:
        PipelineError: no weights, damaged ones, or weights of another run than the metrics next to them.
    """
    if entry.student is None:
        return load_teacher(config, classes, device)
    model = build_student(entry.student, config.recipe, classes, size or entry.size)
    state, metadata = read_saved_weights(entry.weights)
    metrics = entry.folder / "metrics.json"
    if metrics.exists() and "run" in metadata and f'"{metadata["run"]}"' not in metrics.read_text(errors="replace"):
        raise PipelineError(
            f"{entry.weights}: weights of another run",
            expected=f"weights of the run named in {metrics}",
            found=f"run {metadata['run']}",
            do=f"run: pipeline {entry.command} (or dvc repro)",
        )
    load_resized_weights(model, state, str(entry.weights))
    return model.to(device).eval()


def compared_predictions(
    config: Config, predictions: dict[str, dict[str, np.ndarray]], labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Select the rows of the paper's Table 4.

    These are the labels, the teacher, a student trained without distillation, both heads and their mean for the student that
    is fine-tuned or else for the first distilled one, and the joint classifier of each fine-tuned student.

    Args:
        predictions: for each model, the predicted classes of each of its classifiers.
    """
    selected = {TRUTH: labels}
    if TEACHER in predictions:
        selected[TEACHER] = predictions[TEACHER]["class"]
    distilled = [name for name in config.students if config.student_named(name).distillation != "none"]
    plain = [name for name in config.students if name not in distilled]
    source = [*config.finetune.students, *distilled, *plain, ""][0]
    if plain and plain[0] != source:
        selected[f"{plain[0]} class"] = predictions[plain[0]]["class"]
    for name in ("class", "distillation", "mean"):
        if name in predictions.get(source, {}):
            selected[f"{source} {name}"] = predictions[source][name]
    for name in (name for name in predictions if name.endswith(FINETUNED)):
        joint = "mean" if "mean" in predictions[name] else "class"
        selected[f"{name} {joint}"] = predictions[name][joint]
    return selected
