"""Evaluate every model of the experiment on the validation set, and write the report."""

from pathlib import Path
from typing import Any

import torch

from pipeline.common.distributed import Rank
from pipeline.common.errors import PipelineError
from pipeline.common.files import write_text
from pipeline.common.wording import count_of
from pipeline.config.paths import evaluation_folder, store_path, teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import store_spec
from pipeline.models.adapt import load_resized_weights
from pipeline.models.build import build_student
from pipeline.models.class_map import check_same_classes
from pipeline.models.tokens import LayerCosine
from pipeline.models.weights import read_description, read_weights
from pipeline.report.analysis import Analysis, analyze
from pipeline.report.entries import Entry, list_entries, require_weights
from pipeline.report.evaluator import Evaluator
from pipeline.report.examples import Example, draw_examples, example_section, training_examples
from pipeline.report.facts import describe_experiment
from pipeline.report.further_sets import FurtherSets
from pipeline.report.html import Report, write_report
from pipeline.report.plots import Curve, plot_curves, plot_disagreement
from pipeline.report.reliability import plot_reliability, plot_token_cosines
from pipeline.report.settings import describe_report, loading_code, objective, published_as, training_rows
from pipeline.report.tables import (
    Result,
    SizeResult,
    format_sizes,
    format_table,
    write_comparisons,
    write_evidence,
    write_tables,
)
from pipeline.shards.evaluation_sets import sets_fingerprint
from pipeline.shards.index import Index
from pipeline.shards.published import open_index
from pipeline.store.manifest import read_manifest, read_summary
from pipeline.store.reader import Store
from pipeline.training.identity import validation_fingerprint
from pipeline.training.log import read_curve
from pipeline.training.origin import require_student, require_teacher
from pipeline.training.teachers import check_origin


def run(config: Config, device: torch.device, dry_run: bool = False) -> None:
    """Write metrics, tables, pictures and report.html into outputs/NAME/evaluation/.

    metrics.json is the same after every run; what depends on the machine's load is in throughput.json. Additional sets
    (`evaluate.real_labels`, `evaluate.sets`) are checked first, and evaluated at each model's own size.

    Raises:
        PipelineError, UsageError: there is no student, one was not trained yet, or the store is missing or damaged.
    """
    train, val = (open_index(config, split) for split in ("train", "val"))
    entries = list_entries(config)
    evaluator = Evaluator(config, val, device)
    print_entries(entries, val, evaluator.further)
    evaluator.check_sizes(entries)
    if dry_run:
        return
    require_models(config, entries, train)
    store, manifest = open_store(config, train) if config.needs_store("train-student") else (None, None)
    summary = read_summary(teacher_logits_folder(config, "train-student") / "summary.json") if store else {}
    curves, training = read_curves(entries), training_rows(config, entries)
    identities, folder = identify(config, entries, val), evaluation_folder(config)
    evaluations, sizes = {}, []
    for entry in entries:
        evaluations[entry.name] = evaluator.evaluate(entry, evaluator.load(entry))
        sizes += evaluator.size_results(entry)
    if Rank.current(device).rank:
        return  # rank 0 writes
    require_same(identities, identify(config, entries, val), config)
    evaluator.further.warn_of_training_images(train)
    tokens = {name: each.tokens for name, each in evaluations.items() if each.tokens}
    analysis = analyze(config, entries, {name: each.predictions for name, each in evaluations.items()}, val)
    write_comparisons(folder, analysis.headline.comparisons, analysis.classes, analysis.confusions)
    write_evidence(folder, analysis.calibration, tokens)
    examples = training_examples(config, train, store, manifest)
    draw_pictures(folder, analysis, curves, tokens, examples)
    results = [row for each in evaluations.values() for row in each.results]
    report = Report(
        title=config.name,
        results=results,
        analysis=analysis,
        curves=curves,
        tokens=tokens,
        views=example_section(examples),
        training=training,
        facts=describe_report() | describe_experiment(config, train, val, store, summary, device),
        loading=loading_code(config, analysis.headline.best),
    )
    write_report(folder / "report.html", report)
    write_table(folder, results, sizes, analysis)
    write_tables(folder, results, sizes, analysis, tokens, identities)  # last: metrics.json says that all else is there


def identify(config: Config, entries: list[Entry], val: Index) -> dict[str, dict[str, str]]:
    """What identifies each model's weights, the images and the crop, as the metrics of a training do, and the additional sets."""
    shared = config.evaluate.sets_identity(config.data) | sets_fingerprint(config.evaluate)
    validation = {entry.name: {"validation": validation_fingerprint(val.fingerprint, entry.crop)} for entry in entries}
    return {entry.name: published_as(entry.folder) | validation[entry.name] | shared for entry in entries}


def require_models(config: Config, entries: list[Entry], train: Index) -> None:
    """Refuse models that were not trained as configured: the report would show settings that they do not have.

    Raises:
        PipelineError: a model is not trained yet, or was trained with other settings, which the message names.
    """
    require_weights(entries)
    for entry in entries:
        if entry.student is None:
            require_teacher(config, train.fingerprint)
        else:
            require_student(config, train.fingerprint, entry.name)


def require_same(before: dict[str, Any], after: dict[str, Any], config: Config) -> None:
    """Raise a PipelineError if a model was published again while it was evaluated."""
    if changed := [name for name, identity in before.items() if after[name] != identity]:
        raise PipelineError(
            f"{config.name}: evaluate", expected="the same models from the beginning to the end",
            found=f"published again during the evaluation: {', '.join(changed)}", do="run: pipeline evaluate",
        )  # fmt: skip


def read_curves(entries: list[Entry]) -> dict[str, Curve]:
    """The training curves of the models that have one, by name."""
    logged = [(entry, entry.folder / "curve.csv") for entry in entries]
    return {e.name: Curve(objective(e.student), read_curve(path)) for e, path in logged if path.exists()}


def draw_pictures(
    folder: Path,
    analysis: Analysis,
    curves: dict[str, Curve],
    tokens: dict[str, list[LayerCosine]],
    examples: list[Example],
) -> None:
    """Draw every picture of the evaluation as a PNG."""
    plot_disagreement(folder / "disagreement.png", analysis.disagreement)
    plot_curves(folder / "curves.png", curves)
    plot_reliability(folder / "reliability.png", analysis.reliability)
    plot_token_cosines(folder / "token_cosine.png", tokens)
    draw_examples(folder / "views.png", examples)


def write_table(folder: Path, results: list[Result], sizes: list[SizeResult], analysis: Analysis) -> None:
    """Write table.txt, and print it."""
    tables = [format_table(results), *([format_sizes(sizes)] if sizes else []), "\n".join(analysis.headline.lines())]
    text = "\n\n".join([*tables, f"report: {folder / 'report.html'}"]) + "\n"
    write_text(folder / "table.txt", text)
    print(text)


def run_weights(
    config: Config, device: torch.device, weights: str, model: str | None, size: int, dry_run: bool = False
) -> None:
    """Print the accuracy of every classifier of weights from anywhere on the validation set; write nothing.

    Args:
        model: the timm model that the weights are for; that of `student` if not given.

    Raises:
        UsageError, PipelineError: no such model, or the weights are for another one, or for other classes.
    """
    val = open_index(config, "val")
    state, described = read_weights(weights), read_description(Path(weights))
    check_description(config, weights, described, val)
    student = config.student if model is None else config.student.model_copy(update={"model": model, "kwargs": {}})
    built = build_student(student, config.recipe, len(val.classes), size)
    load_resized_weights(built, state, weights)
    print(f"{weights}: {student.model} at {size} px, crop {config.evaluate.crop:g}, on {len(val):,} images")
    evaluator = Evaluator(config, val, device)
    if dry_run:
        return
    # others' files do not say whether a distillation head was trained, so all heads are shown
    student = student.model_copy(update={"distillation": "none" if described.get("heads") == "class" else "hard"})
    crop, path = config.evaluate.crop, Path(weights)
    entry = Entry(path.name, student.model, path, "", size, crop, "float32", student=student)
    evaluation = evaluator.evaluate(entry, built.to(device).eval())
    if Rank.current(device).rank == 0:
        print(format_table(evaluation.results))


def check_description(config: Config, weights: str, described: dict[str, Any], val: Index) -> None:
    """Refuse weights whose file says that they are for other classes, or for input that is normalized differently.

    Args:
        described: the file's description; {} for a file from elsewhere.
    """
    if classes := described.get("classes"):
        check_same_classes(f"{weights}: weights", classes, val.classes, "use a data set of the same classes, in this order")
    for key, configured in {"mean": config.recipe.mean, "std": config.recipe.std}.items():
        if list(described.get(key, configured)) != list(configured):
            raise PipelineError(
                f"{weights}: weights of a model with another normalization",
                expected=f"recipe.{key} {list(configured)}", found=f"{key} {described[key]}",
                do=f"add: --set 'recipe.{key}={described[key]}'",
            )  # fmt: skip


def print_entries(entries: list[Entry], val: Index, further: FurtherSets) -> None:
    print(f"evaluate {count_of(len(entries), 'model')} on {count_of(len(val), 'image')}")
    for entry in entries:
        missing = "" if entry.weights.exists() else " (missing)"
        print(f"  {entry.name}: {entry.model}, {entry.size} px, crop {entry.crop:g}: {entry.weights}{missing}")
    if lines := further.describe():
        print("\n".join(["additional sets", *lines]))


def open_store(config: Config, index: Index) -> tuple[Store, dict[str, Any]]:
    """The store that the students were trained from, and its manifest.

    Raises:
        PipelineError: it was not computed, is gone, or is of a teacher other than the published one.
    """
    manifest = read_manifest(teacher_logits_folder(config, "train-student") / "manifest.json")
    store = Store.open(store_path(config, manifest["fingerprint"]), index, config.recipe)
    check_origin(config, store, store_spec(config, "train-student"))
    return store, manifest
