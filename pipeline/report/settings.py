"""How the compared models were trained, for how long, when and by which code; and Python code that loads one."""

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipeline.common.files import read_json_object
from pipeline.common.wording import duration
from pipeline.config.paths import TEACHER, index_path, state_folder
from pipeline.config.schema import Config, Student
from pipeline.config.types import is_custom_model
from pipeline.models.build import build_student
from pipeline.report.entries import Entry
from pipeline.training.log import read_log
from pipeline.training.optim import peak_lr

OBJECTIVE = ("distillation", "alpha", "tau", "soft_reduction", "reuse_view")
"""The settings of a student that `objective` describes."""

LOADING = """\
import json
from pathlib import Path
{imports}
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from timm.data import create_transform

classes = json.loads(Path({index!r}).read_text())["classes"]
model = {function}num_classes=len(classes){arguments})
model.load_state_dict(load_file({weights!r}))
transform = create_transform({size}, interpolation="bicubic", mean={mean}, std={std}, crop_pct={crop})
picture = transform(ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"))[None]
with torch.inference_mode():
    confidence, number = {logits}.softmax(1)[0].max(0)
print(classes[number], float(confidence))
"""


@dataclass(frozen=True)
class TrainingRow:
    """A model's training settings, as text."""

    model: str
    objective: str
    epochs: str
    batch_size: str
    lr: str
    weight_decay: str
    optimizer: str
    time: str


def training_rows(config: Config, entries: list[Entry]) -> list[TrainingRow]:
    """A row per model, without a pretrained teacher that was used as it is."""
    rows = []
    for entry in entries:
        as_it_is = entry.name == TEACHER and config.teacher.weights and not trained_run(entry.folder)
        if (settings := entry.training) and not as_it_is:
            rows.append(
                TrainingRow(
                    entry.name,
                    objective(entry.student),
                    f"{settings.epochs:,}",
                    f"{settings.batch_size:,}",
                    f"{peak_lr(settings):.3g}",
                    f"{settings.weight_decay:g}",
                    settings.optimizer,
                    _training_time(config, entry),
                )
            )
    return rows


def objective(student: Student | None) -> str:
    """The training loss in words; curves of different ones are not comparable."""
    if student is None or student.distillation == "none":
        return "labels only"
    soft = f", τ {student.tau:g}, {student.soft_reduction}" if student.distillation == "soft" else ""
    reused = "" if student.reuse_view is None else f", predictions for view {student.reuse_view} only"
    return f"{student.distillation} distillation, α {student.alpha:g}{soft}{reused}"


def trained_run(folder: Path) -> str | None:
    """The fingerprint of the run that trained the model in a folder; None if the pipeline did not train it."""
    return published_as(folder).get("run")


def published_as(folder: Path) -> dict[str, str]:
    """What identifies the published weights of a model, from its metrics.json: `run`, and `weights` of a teacher."""
    metrics = read_json_object(folder / "metrics.json")
    return {key: metrics[key] for key in ("run", "weights") if key in metrics}


def _training_time(config: Config, entry: Entry) -> str:
    """Training without validation, as the log of the run has it; empty if the log is gone."""
    run = trained_run(entry.folder)
    log = state_folder(config, run) / "log.jsonl" if run else None
    if log is None or not log.exists():
        return ""
    seconds = sum(line["speed"]["seconds"] for line in read_log(log) if line["kind"] == "epoch")
    return duration(seconds)


def describe_report() -> dict[str, dict[str, str]]:
    """A section of the report: when and by which code it was written."""
    origin = {"written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    commit = _git("rev-parse", "HEAD")
    if commit:
        changed = " with uncommitted changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
        origin["commit"] = f"{commit[:12]}{changed}"
    return {"Report": origin}


def _git(*arguments: str) -> str:
    """The output of a git command in the folder of the code; empty without git or a repository."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def loading_code(config: Config, entry: Entry) -> str:
    """Python code that loads a student with timm alone, or with a custom model's function, and classifies a picture.

    The classifier is the joint one of a student with two heads, unless only the class head was trained.
    """
    assert entry.student
    logits = "model.eval()(picture)"
    if is_custom_model(entry.model):
        module, _, name = entry.model.partition(":")
        imports, function, arguments = f"from {module} import {name}", f"{name}(", entry.student.kwargs
    else:
        imports, function = "import timm", f"timm.create_model({entry.model!r}, "
        with torch.device("meta"):  # only its arguments
            built = build_student(entry.student, config.recipe, 1, entry.size)
        arguments = built.kwargs
        if built.distilled and not entry.distilled:  # timm would average in the other head
            logits = "model.head(model.eval().forward_features(picture)[:, 0])"
    return LOADING.format(
        imports=imports,
        function=function,
        arguments="".join(f", {name}={value!r}" for name, value in arguments.items()),
        weights=str(entry.weights),
        size=entry.size,
        mean=config.recipe.mean,
        std=config.recipe.std,
        crop=entry.crop,
        index=str(index_path(config, "val")),
        logits=logits,
    )
