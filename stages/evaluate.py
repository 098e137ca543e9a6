"""Every model of the experiment on the validation set: accuracy, agreement, cost, and the report."""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.common.distributed import Rank
from pipeline.common.errors import PipelineError
from pipeline.common.files import atomic_write
from pipeline.config.paths import (
    FINETUNED,
    TEACHER,
    evaluated_models,
    evaluation_folder,
    index_path,
    store_path,
    teacher_logits_folder,
)
from pipeline.config.schema import Config, Student
from pipeline.models.adapt import load_resized_weights
from pipeline.models.build import NormalizedModel, build_student, parameter_count
from pipeline.models.evaluation import (
    classifiers,
    disagreement,
    multiply_adds,
    predict,
    throughput,
    top_k_accuracy,
)
from pipeline.models.teacher import load_teacher
from pipeline.models.weights import read_saved_weights, read_weights
from pipeline.report.facts import describe_experiment, shown_samples
from pipeline.report.html import Result, format_table, write_report
from pipeline.report.plots import draw_views, plot_curves, plot_disagreement
from pipeline.shards.index import Index
from pipeline.store.manifest import read_manifest, read_summary
from pipeline.store.reader import Store
from pipeline.training.log import read_curve

TRUTH = "truth"
SIZES = ("model", "trained", "size", "classifier", "top1", "top5")  # columns of sizes.csv


@dataclass(frozen=True)
class Entry:
    """A model to evaluate, and how."""

    name: str
    model: str
    folder: Path
    """Of its weights and curve."""
    command: str
    """What makes them."""
    size: int
    crop: float
    precision: str
    student: Student | None = None
    """None: it is the teacher."""

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def taught(self) -> bool:
        """Whether a second head learned: without distillation it was never trained."""
        return self.student is not None and self.student.distillation != "none"


def run(config: Config, device: torch.device, dry_run: bool = False) -> None:
    """Write metrics, tables, pictures and report.html into outputs/<name>/evaluation/.

    metrics.json holds what is the same on every run; what depends on the machine's load is in
    throughput.json.

    Raises:
        PipelineError: a model was not trained yet, the store is missing or damaged.
    """
    train_index, val_index = (Index(index_path(config, split)) for split in ("train", "val"))
    entries = list_entries(config)
    print(f"evaluate {len(entries)} models on {len(val_index):,} images")
    for entry in entries:
        there = "" if entry.weights.exists() else " (missing)"
        print(f"  {entry.name}: {entry.model}, {entry.size} px, crop {entry.crop:g}: {entry.weights}{there}")
    if dry_run:
        return
    refuse_missing(entries)
    answers = open_store(config, train_index) if config.needs_teacher("train-student") else None
    summary = read_summary(teacher_logits_folder(config, "train-student") / "summary.json") if answers else {}
    curves = {e.name: read_curve(e.folder / "curve.csv") for e in entries if (e.folder / "curve.csv").exists()}
    labels, results, decisions, at_sizes = torch.from_numpy(val_index.labels()), [], {}, []
    for entry in entries:
        rows, decisions[entry.name] = evaluate(config, entry, val_index, labels, device)
        results += rows
        for size in [] if entry.name == TEACHER and config.teacher.size else config.evaluate.sizes:
            at_sizes += at_size(config, entry, size, val_index, labels, device)
    if Rank.init_process_group(device).rank:
        return  # rank 0 writes
    table = disagreement(deciders(config, decisions, labels.numpy()))
    folder = evaluation_folder(config)
    write_tables(folder, results, at_sizes, table)
    plot_curves(folder / "curves.png", curves)
    plot_disagreement(folder / "disagreement.png", table)
    pictures = {"curves": folder / "curves.png", "views": folder / "views.png"}
    draw_views(pictures["views"], shown_samples(config, train_index, answers))
    facts = describe_experiment(config, train_index, val_index, answers and answers[0], summary, device)
    write_report(folder / "report.html", config.name, results, table, pictures, facts)
    sizes = f"\n{format_sizes(at_sizes)}\n" if at_sizes else ""
    text = f"{format_table(results)}\n{sizes}\nreport: {folder / 'report.html'}\n"
    with atomic_write(folder / "table.txt") as temporary:
        temporary.write_text(text)
    print(text)


def run_weights(
    config: Config, device: torch.device, weights: str, model: str | None, size: int, dry_run: bool = False
) -> None:
    """Print a table of every way that weights from anywhere decide about the validation set; nothing is written.

    Args:
        model: the timm model that they are of; `student`'s if not given.

    Raises:
        UsageError, PipelineError: no such model, or weights of another.
    """
    val = Index(index_path(config, "val"))
    student = config.student if model is None else config.student.model_copy(update={"model": model, "kwargs": {}})
    built = build_student(student, config.recipe, len(val.classes), size)
    load_resized_weights(built, read_weights(weights), weights)
    print(f"{weights}: {student.model} at {size} px, crop {config.evaluate.crop:g}, on {len(val):,} images")
    if dry_run:
        return
    student = student.model_copy(update={"distillation": "hard"})  # a file does not tell: all heads that it has are shown
    entry = Entry(Path(weights).name, student.model, Path(weights), "", size, config.evaluate.crop, "float32", student)
    rows, _ = decide(config, entry, built.to(device).eval(), val, torch.from_numpy(val.labels()), device)
    if Rank.init_process_group(device).rank == 0:
        print(format_table(rows))


def list_entries(config: Config) -> list[Entry]:
    """The teacher, the students and the fine-tuned ones, in the order of the tables."""
    return [describe_entry(config, name, folder) for name, folder in evaluated_models(config).items()]


def describe_entry(config: Config, name: str, folder: Path) -> Entry:
    """At which size and crop a model is evaluated, and what makes its weights."""
    size, crop, teacher, tuned = config.recipe.size, config.evaluate.crop, config.teacher, config.finetune
    if name == TEACHER:
        model = teacher.weights or teacher.model
        size = config.teacher_size("train-student")
        return Entry(name, model, folder, "teacher", size, teacher.crop, teacher.precision)
    if name.endswith(FINETUNED):
        source = name.removesuffix(f"-{FINETUNED}")
        student, crop = config.finetune_student(source), config.evaluate.crop_finetuned
        command = f"finetune --student {source}"
        return Entry(name, student.model, folder, command, tuned.size, crop, tuned.precision, student)
    student = config.student_named(name)
    return Entry(name, student.model, folder, f"train-student --student {name}", size, crop, student.precision, student)


def refuse_missing(entries: list[Entry]) -> None:
    """Before hours of evaluation, not after."""
    missing = [entry for entry in entries if not entry.weights.exists()]
    if missing:
        raise PipelineError(
            f"{missing[0].weights}: no weights",
            expected=f"those of {', '.join(entry.name for entry in missing)}",
            found="nothing",
            do=f"run: pipeline {missing[0].command} (or dvc repro)",
        )


def load_model(
    config: Config, entry: Entry, classes: int, device: torch.device, size: int | None = None
) -> NormalizedModel:
    """An entry's model with its weights, in eval mode on the device; at its own size, or at another.

    Raises:
        PipelineError: no weights, damaged ones, or those of another run than the metrics beside them.
    """
    if entry.student is None:
        return load_teacher(config, classes, device)
    model = build_student(entry.student, config.recipe, classes, size or entry.size)
    state, about = read_saved_weights(entry.weights)
    told = entry.folder / "metrics.json"
    if told.exists() and "run" in about and f'"{about["run"]}"' not in told.read_text(errors="replace"):
        raise PipelineError(
            f"{entry.weights}: weights of another run",
            expected=f"those of the run that {told} names",
            found=f"run {about['run']}",
            do=f"run: pipeline {entry.command} (or dvc repro)",
        )
    load_resized_weights(model, state, str(entry.weights))
    return model.to(device).eval()


def evaluate(
    config: Config, entry: Entry, val: Index, labels: torch.Tensor, device: torch.device
) -> tuple[list[Result], dict[str, np.ndarray]]:
    """A model's rows of the results, and what each of its classifiers decided, int64 (samples,)."""
    return decide(config, entry, load_model(config, entry, len(val.classes), device), val, labels, device)


def decide(
    config: Config, entry: Entry, model: NormalizedModel, val: Index, labels: torch.Tensor, device: torch.device
) -> tuple[list[Result], dict[str, np.ndarray]]:
    """As `evaluate`, of a model in eval mode on the device."""
    settings, batch, size = config.evaluate, config.evaluate.batch_size, entry.size
    heads = predict(model, val, size, entry.crop, batch, settings.workers, device, entry.precision)
    macs = multiply_adds(model, size)
    speed = 0.0
    if Rank.init_process_group(device).rank == 0:
        speed = throughput(model, size, batch, settings.throughput_seconds, entry.precision)
    rows, decided = [], {}
    for name, scores in classifiers(heads, model.distilled and entry.taught).items():
        decided[name] = scores.argmax(1).numpy()
        rows.append(
            Result(
                entry.name,
                f"{entry.model}, {size} px",
                name,
                top_k_accuracy(scores, labels, 1),
                top_k_accuracy(scores, labels, 5),
                parameter_count(model.model),
                macs,
                speed,
            )
        )
    return rows, decided


def at_size(
    config: Config, entry: Entry, size: int, val: Index, labels: torch.Tensor, device: torch.device
) -> list[dict[str, str | int | float]]:
    """A model's accuracy at another size than its own, as lines of sizes.csv; positions are resized."""
    model = load_model(config, entry, len(val.classes), device, size)
    settings = config.evaluate
    heads = predict(model, val, size, entry.crop, settings.batch_size, settings.workers, device, entry.precision)
    rows = []
    for name, scores in classifiers(heads, model.distilled and entry.taught).items():
        both = (top_k_accuracy(scores, labels, k) for k in (1, 5))
        rows.append(dict(zip(SIZES, (entry.name, entry.size, size, name, *both), strict=True)))
    return rows


def format_sizes(rows: list[dict[str, Any]]) -> str:
    """Top-1 of every model's joint or only classifier, a column a size."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    lines = [f"{'top-1 % at':<24}" + "".join(f"{size:>8} px" for size in sizes)]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        joint = "mean" if any(row["classifier"] == "mean" for row in own) else "class"
        best = {row["size"]: row["top1"] for row in own if row["classifier"] == joint}
        label = f"{name} ({own[0]['trained']} px)"
        cells = [f"{100 * best[size]:.2f}" if size in best else "" for size in sizes]
        lines.append(f"{label:<24}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def deciders(
    config: Config, decisions: dict[str, dict[str, np.ndarray]], labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Table 4's rows: truth, teacher, a student without distillation, the distilled one's classifiers."""
    chosen = {TRUTH: labels}
    if TEACHER in decisions:
        chosen[TEACHER] = decisions[TEACHER]["class"]
    listen = {name: config.student_named(name).distillation != "none" for name in config.students}
    plain = [name for name in listen if not listen[name]]
    # the one whose heads are told apart: what is fine-tuned, or else what is distilled
    source = [*config.finetune.students, *(name for name in listen if listen[name]), *plain, ""][0]
    if plain and plain[0] != source:
        chosen[f"{plain[0]} class"] = decisions[plain[0]]["class"]
    for name in ("class", "distillation", "mean"):
        if name in decisions.get(source, {}):
            chosen[f"{source} {name}"] = decisions[source][name]
    for name in (name for name in decisions if name.endswith(FINETUNED)):
        joint = "mean" if "mean" in decisions[name] else "class"
        chosen[f"{name} {joint}"] = decisions[name][joint]
    return chosen


def open_store(config: Config, index: Index) -> tuple[Store, dict[str, Any]]:
    """The store that the students were taught from, and its manifest.

    Raises:
        PipelineError: it was not computed, or is gone.
    """
    manifest = read_manifest(teacher_logits_folder(config, "train-student") / "manifest.json")
    return Store.open(store_path(config, manifest["fingerprint"]), index, config.recipe), manifest


def write_tables(
    folder: Path, results: list[Result], at_sizes: list[dict[str, Any]], table: dict[str, dict[str, float]]
) -> None:
    """metrics.json, throughput.json, accuracy.csv, sizes.csv and disagreement.csv."""
    metrics: dict[str, dict[str, Any]] = {}
    for row in results:
        cost = {"parameters": row.parameters, "gmacs": row.macs / 1e9}
        metrics.setdefault(row.model, cost)[row.classifier] = {"top1": row.top1, "top5": row.top5}
    speeds = {row.model: {"images_per_second": round(row.throughput, 1)} for row in results}
    for name, values in (("metrics", metrics), ("throughput", speeds)):
        with atomic_write(folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n")
    accuracy = [{key: asdict(row)[key] for key in ("model", "classifier", "top1", "top5")} for row in results]
    pairs = [
        {"first": first, "second": second, "share": share}
        for first, row in table.items()
        for second, share in row.items()
    ]
    for name, lines in (("accuracy", accuracy), ("sizes", at_sizes), ("disagreement", pairs)):
        with atomic_write(folder / f"{name}.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]) if lines else SIZES)
            writer.writeheader()
            writer.writerows(lines)
