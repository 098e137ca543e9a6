"""`pipeline status`: how far every stage of an experiment has got, from its files and locks alone; nothing is written.

What is published under outputs/ names its run or store by fingerprint, and run.json and the store's attributes say
which configuration that belongs to.

Processes on this machine hold locks that the kernel knows. Elsewhere a store counts as running while its lease is renewed
(so for five minutes after its writer was killed), a training run and `prepare` while their newest file is less than ten
minutes old. `evaluate` writes at its end only.
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.cli.failures import read_failure
from pipeline.cli.matching import have_changed, is_foreign, is_own_store, lacks_sets
from pipeline.cli.runs import Experiment
from pipeline.cli.scan import (
    is_store_of,
    latest,
    modification_times,
    newest,
    number,
    read_json,
    read_log_tail,
    written_units,
)
from pipeline.cli.status_table import (
    Row,
    StageFacts,
    best_top1,
    headline_top1,
    log_summary,
    row_of,
    short,
    show,
    write_rate,
)
from pipeline.common.errors import is_io_error, unreadable
from pipeline.common.lock import is_held
from pipeline.config.paths import (
    DATA_LOCK,
    FINETUNED,
    RUN_LOCK,
    TEACHER,
    evaluated_models,
    evaluation_folder,
    finetune_folder,
    index_path,
    local_work,
    student_folder,
    teacher_folder,
)
from pipeline.config.schema import Config, Teacher, Training
from pipeline.config.store_spec import StoreSpec, store_spec
from pipeline.shards.prepared import other_settings


def run(config: Config, json: bool = False, watch: float | None = None) -> None:
    """Print one row per stage; with `watch`, again after that many seconds, until interrupted.

    Raises:
        Unreadable: a folder or a server cannot be read.
    """
    with contextlib.suppress(KeyboardInterrupt) if watch else contextlib.nullcontext():
        while True:
            rows = survey(config, time.time())
            if watch and not json:
                click.clear()
            print(show(rows, config.name, json), flush=True)
            if not watch:
                break
            time.sleep(watch)


def survey(config: Config, now: float) -> list[Row]:
    """The rows of all stages, in the order of `dvc repro`."""
    try:
        return [row_of(_with_failure(facts, config), now) for facts in gather(Experiment(config))]
    except Exception as error:
        if not is_io_error(error):
            raise
        raise unreadable(getattr(error, "filename", None) or config.work, error) from error


def _with_failure(facts: StageFacts, config: Config) -> StageFacts:
    """Add the error of the stage's last command with these settings, unless something was written after it.

    A command for all students says nothing of those that are done.
    """
    done = facts.published and not facts.foreign and facts.done == facts.total
    failures = [read_failure(config, name) for name in {facts.stage, facts.stage if done else facts.stage.partition("@")[0]}]
    errors = {number(failure.get("time")) or 0.0: str(failure.get("what")) for failure in failures}
    last = max(errors)
    return replace(facts, failure=errors[last]) if last > max(facts.modified or 0.0, 1.0) - 1.0 else facts


def gather(experiment: Experiment) -> list[StageFacts]:
    """The facts of every stage that is needed, in the order of `dvc repro`."""
    config = experiment.config
    tuned, adapted, folder = config.finetune, config.teacher_finetune, teacher_folder(config)
    facts = [_prepare(experiment)]
    if config.runs_teacher("train-student"):
        settings, other = _teacher_training(experiment), "train-student" in experiment.foreign_teachers
        facts.append(_training(experiment, "teacher", settings, folder, other))
    if config.needs_store("train-student"):
        facts.append(_store(experiment, "teacher-logits", store_spec(config, "train-student")))
    for name in config.students:
        settings, folder = config.student_named(name), student_folder(config, name)
        other = "train-student" in experiment.foreign_stores and settings.distillation != "none"
        facts.append(_training(experiment, f"train-student@{name}", settings, folder, other))
    if config.needs_teacher("finetune"):
        folder = teacher_folder(config, "finetune")
        other = "finetune" in experiment.foreign_teachers
        facts.append(_training(experiment, "teacher-finetune", adapted if adapted.epochs else None, folder, other))
    if config.needs_store("finetune"):
        facts.append(_store(experiment, "teacher-logits-finetune", store_spec(config, "finetune")))
    if config.students or tuned.weights:
        for name in tuned.students:
            other = "finetune" in experiment.foreign_stores and config.student_named(name).distillation != "none"
            facts.append(_training(experiment, f"finetune@{name}", tuned, finetune_folder(config, name), other))
    models = [fact for fact in facts if fact.stage.partition("@")[0] in ("teacher", "train-student", "finetune")]
    return [*facts, _evaluate(experiment, any(fact.foreign for fact in models))]


def _prepare(experiment: Experiment) -> StageFacts:
    """The shards; how many there will be is known only from a listing of the images, which would take too long here."""
    config, indices = experiment.config, experiment.indices
    if all(indices.values()):
        count = sum(len(index["shards"]) for index in indices.values())
        images = " + ".join(short(index["samples"]) for index in indices.values())
        modified = latest(newest(index_path(config, split).parent) for split in indices)
        other = bool(other_settings(config))
        return StageFacts("prepare", "shards", count, count, published=True, foreign=other, modified=modified, note=f"{images} images")
    # without an index, the owner of a folder is unknown: per split, take the newest one that no other experiment uses
    data, times = local_work(config.work) / "data", []
    others = [path for path in Path("outputs").glob("*/data/*/index.json") if path.parents[2].name != config.name]
    theirs = {Path(str(read_json(path).get("location"))).parent.name for path in others}
    for split in indices:
        folders = [modification_times(path) for path in data.glob(f"*/{split}") if path.parent.name not in theirs]
        tars = [[when for name, when in files.items() if name.endswith(".tar")] for files in folders]
        times += max(tars, key=lambda found: max(found, default=0.0), default=[])
    return StageFacts(
        "prepare", "shards", len(times), begun=bool(times), modified=latest(times), rate=write_rate(times),
        images_per_unit=config.data.shard_samples, writers=is_held(data / DATA_LOCK),
    )  # fmt: skip


def _teacher_training(experiment: Experiment) -> Teacher | None:
    """The teacher's settings if it is trained: without weights, or if their classes are not the index's."""
    teacher = experiment.config.teacher
    run = read_json(teacher_folder(experiment.config) / "metrics.json").get("run")
    return teacher if not teacher.weights or run or experiment.states_of("teacher") else None


def _training(
    experiment: Experiment, stage: str, settings: Training | None, folder: Path, other: bool = False
) -> StageFacts:
    """A run that publishes into `folder`; without settings, the weights come from elsewhere.

    Args:
        other: what is published there is known to be another configuration's.
    """
    metrics = read_json(folder / "metrics.json") if (folder / "weights.safetensors").exists() else {}
    own = experiment.states_of(stage) if settings else []
    published, own_runs = metrics.get("run"), experiment.published_runs(stage) if settings else []
    # trained by the pipeline, or weights from elsewhere
    foreign = bool(metrics) and (other or isinstance(published, str) != bool(settings))
    foreign |= is_foreign(published, own_runs, experiment.known_runs)
    total, images = experiment.steps(settings) if settings else (None, None)
    state = max(own, key=lambda state: state.modified, default=None)
    log: dict[str, Any] = {"top1": number(headline_top1(metrics))}
    if state and not (state.complete and metrics):
        log = log_summary(read_log_tail(state.folder / "log.jsonl"))
    kept = state.checkpoint if state else 0
    if state.complete if state else metrics and not foreign:
        kept = total or 0
    return StageFacts(
        stage, "steps", max(log.get("done", 0), kept), total, kept,
        begun=state is not None,
        published=bool(metrics),
        foreign=foreign,
        writers=state and is_held(state.folder / RUN_LOCK),
        modified=latest([newest(folder), state and state.modified]),
        rate=log["samples"] / images if log.get("samples") and images else None,
        images_per_unit=images,
        loss=log.get("loss"),
        top1=log["top1"],
    )  # fmt: skip


def _store(experiment: Experiment, stage: str, spec: StoreSpec) -> StageFacts:
    """A store, and its published manifest."""
    samples = [samples for samples in experiment.samples if samples]
    manifest, summary = (read_json(spec.folder / f"{name}.json") for name in ("manifest", "summary"))
    published, fingerprint = bool(manifest and summary), str(manifest.get("fingerprint"))
    own = {
        str(attributes.get("fingerprint")): written_units(path, spec.kind, spec.blocks)
        for path, attributes in experiment.stores
        if spec.purpose not in experiment.foreign_teachers
        and is_store_of(spec, experiment.index, attributes)
        and is_own_store(experiment.config, spec, attributes)
    }
    known = {str(attributes.get("fingerprint")) for _, attributes in experiment.stores}
    same = (manifest.get("views"), manifest.get("kind")) == (spec.views, spec.kind)
    other = not same or spec.purpose in experiment.foreign_stores
    foreign = published and (other or is_foreign(fingerprint, own, known))
    units = max(own.values(), key=lambda units: units.modified, default=None)
    total = spec.blocks * len(samples) if samples else None
    if units:
        done = len(units.times)
    else:
        done = total if total and published and not foreign else 0
    note = f"{units.writers} writers" if units and units.writers > 1 else ""
    agreement = number(summary.get("agreement_with_labels"))
    if published and not foreign and agreement is not None:
        note = f"agreement with labels: {100 * agreement:.1f} %"
    return StageFacts(
        stage, "units", done, total,
        begun=units is not None,
        published=published,
        foreign=foreign,
        writers=units.writers if units else 0,
        modified=latest([newest(spec.folder), units and units.modified]),
        rate=write_rate(units.times) if units else None,
        images_per_unit=spec.recipe.block * sum(samples) / len(samples) if samples else None,
        note=note,
    )  # fmt: skip


def _evaluate(experiment: Experiment, other_models: bool) -> StageFacts:
    """All models at once, written at the end; the top-1 accuracy is the best student's.

    Args:
        other_models: one of the published models belongs to another configuration.
    """
    config, folder = experiment.config, evaluation_folder(experiment.config)
    models = evaluated_models(config)
    metrics = read_json(folder / "metrics.json") if (folder / "table.txt").exists() else {}
    known = {TEACHER, *config.variants, *(f"{name}-{FINETUNED}" for name in config.variants)}
    other = other_models or metrics.keys() & known != models.keys() or have_changed(metrics, models) or lacks_sets(metrics, config)
    foreign = bool(metrics) and other
    untrained = [name for name, where in models.items() if not (where / "weights.safetensors").exists()]
    return StageFacts(
        "evaluate", "models", len(models) if metrics and not foreign else 0, len(models),
        published=bool(metrics),
        foreign=foreign,
        modified=newest(folder) if metrics else None,
        top1=best_top1([metrics.get(name) for name in models if name != TEACHER]),
        note=f"waits for {', '.join(untrained)}" if untrained else "",
    )  # fmt: skip
