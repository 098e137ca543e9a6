"""How far every stage of an experiment is, from its files alone: nothing is written, no process is asked.

Trainings and writers of stores hold locks, of which this machine's kernel knows. Of one on another machine, or of a
store at a URL, the files tell: a store runs while a lease beside it is renewed, so a writer that is killed counts for
five minutes more; a training, and `prepare` anywhere, while its newest file is of the last ten minutes. `evaluate`
writes at its end only.
"""

import contextlib
import json
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from pipeline.batches.plan import training_plan
from pipeline.cli.failures import failure_path
from pipeline.cli.glance import (
    latest,
    list_stores,
    newest,
    number,
    read_index,
    read_json,
    read_tail,
    written,
    written_units,
)
from pipeline.cli.progress import (
    Facts,
    Row,
    is_store_of,
    rate_of,
    row_of,
    short,
    table,
    told_by_log,
    top1_of,
)
from pipeline.common.errors import PipelineError, is_io_error, unreadable
from pipeline.common.lock import is_held
from pipeline.config.paths import (
    DATA_LOCK,
    FINETUNED,
    FINGERPRINT,
    RUN_LOCK,
    TEACHER,
    evaluated_models,
    evaluation_folder,
    finetune_folder,
    index_path,
    local_work,
    student_folder,
    teacher_folder,
    teacher_logits_folder,
)
from pipeline.config.schema import PURPOSES, Config, Training
from pipeline.config.store_spec import StoreSpec, store_spec
from pipeline.training.identity import configured_runs, is_run_of
from pipeline.training.log import read_curve


def run(config: Config, as_json: bool = False, watch: float | None = None) -> None:
    """Print a row a stage; with `watch`, anew every so many seconds until it is interrupted.

    Raises:
        Unreadable: a folder or a server cannot be read.
    """
    with contextlib.suppress(KeyboardInterrupt) if watch else contextlib.nullcontext():
        while True:
            rows = survey(config, time.time())
            if watch and not as_json:
                click.clear()
            print(as_lines(rows) if as_json else f"{config.name}\n\n{table(rows)}", flush=True)
            if not watch:
                break
            time.sleep(watch)


def as_lines(rows: list[Row]) -> str:
    """A JSON array, one object a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]"


def survey(config: Config, now: float) -> list[Row]:
    """Every stage's row, in the order of `dvc repro`."""
    try:
        return [row_of(with_failure(facts, config), now) for facts in gather(Experiment(config))]
    except Exception as error:
        if not is_io_error(error):
            raise
        raise unreadable(getattr(error, "filename", None) or config.work, error) from error


def with_failure(facts: Facts, config: Config) -> Facts:
    """What its last command failed over, unless something was written since."""
    told = [read_json(failure_path(config, name)) for name in {facts.stage, facts.stage.partition("@")[0]}]
    times = {number(failure.get("time")) or 0.0: str(failure.get("what")) for failure in told}
    last = max(times)
    return replace(facts, failure=times[last]) if last > max(facts.moved or 0.0, 1.0) - 1.0 else facts


@dataclass
class State:
    """A training's folder below `work`."""

    folder: Path
    described: dict[str, Any]
    files: dict[str, float]
    """When each was written."""

    @property
    def complete(self) -> bool:
        return "final.safetensors" in self.files

    @property
    def moved(self) -> float:
        return max(self.files.values(), default=0.0)

    @property
    def checkpoint(self) -> int:
        """The step that the newest one goes on from; 0 without any."""
        names = [name for name in self.files if re.fullmatch(r"step-\d{9}\.ckpt", name)]
        return max((int(name[5:14]) for name in names), default=0)

    @property
    def writers(self) -> int | None:
        """Of a training on this machine; None where it may be another's."""
        return is_held(self.folder / RUN_LOCK)

    def log(self) -> list[dict[str, Any]]:
        return read_tail(self.folder / "log.jsonl")


@dataclass(frozen=True)
class Counted:
    """Shards, each with its number of samples."""

    names: list[str]
    samples: list[int]


class Experiment:
    """A configuration, and what is read once for all its stages."""

    def __init__(self, config: Config):
        self.config = config
        self.indices = {split: read_index(index_path(config, split)) for split in ("train", "val")}
        self.index: str | None = self.indices["train"].get("fingerprint")
        self.names = [shard["name"] for shard in self.indices["train"].get("shards", [])]
        self.samples = [shard["samples"] for shard in self.indices["train"].get("shards", [])]
        self.stores, self.runs = list_stores(config.work), configured_runs(config, self.index)
        # a folder without run.json is of an earlier version: nothing tells what it is of
        found = [path for path in (local_work(config.work) / "state").glob("*") if FINGERPRINT.fullmatch(path.name)]
        folders = [(folder, read_json(folder / "run.json")) for folder in found]
        self.states = [State(folder, described, written(folder)) for folder, described in folders if described]

    def states_of(self, stage: str) -> list[State]:
        """Those of the configuration's settings, and of the store that is published."""
        run, student = self.runs[stage], stage.partition("@")[2]
        if stage.startswith("finetune@"):
            run = run | {"name": f"finetune {student} at {self.config.finetune.size}"}
        elif student:  # with --teacher online the settings are the same, the name is not
            run = run | {"name": f"student {student}"}
        purpose = "finetune" if stage.startswith("finetune@") else "train-student"
        published = read_json(teacher_logits_folder(self.config, purpose) / "manifest.json").get("fingerprint")
        return [
            state
            for state in self.states
            if is_run_of(run, state.described)
            and (None in (published, told := state.described.get("store")) or told == published)
        ]

    def steps(self, settings: Training) -> tuple[int | None, float | None]:
        """Steps of a whole training, and the samples of one; None before there is an index."""
        if not any(self.samples):
            return None, None
        recipe = self.config.recipe
        plan = training_plan(Counted(self.names, self.samples), recipe, settings, recipe.block)
        return settings.epochs * plan.steps_per_epoch, plan.batch_groups * sum(self.samples) / plan.groups


def gather(experiment: Experiment) -> list[Facts]:
    """Of every stage that is needed, in the order of `dvc repro`."""
    config = experiment.config
    teacher, tuned, adapted = config.teacher, config.finetune, config.teacher_finetune
    facts = [prepared(experiment)]
    if any(map(config.needs_teacher, PURPOSES)):
        facts.append(trained(experiment, "teacher", None if teacher.weights else teacher, teacher_folder(config)))
    if config.needs_teacher("train-student"):
        facts.append(stored(experiment, "teacher-logits", store_spec(config, "train-student")))
    for name in config.students:
        settings, folder = config.student_named(name), student_folder(config, name)
        facts.append(trained(experiment, f"train-student@{name}", settings, folder))
    if config.needs_teacher("finetune"):
        folder = teacher_folder(config, "finetune")
        facts += [
            trained(experiment, "teacher-finetune", adapted if adapted.epochs else None, folder),
            stored(experiment, "teacher-logits-finetune", store_spec(config, "finetune")),
        ]
    if config.students or tuned.weights:
        for name in tuned.students:
            facts.append(trained(experiment, f"finetune@{name}", tuned, finetune_folder(config, name)))
    return [*facts, evaluated(experiment)]


def prepared(experiment: Experiment) -> Facts:
    """Shards; how many there will be is told by the listing of the images, which would take too long here."""
    config, indices = experiment.config, experiment.indices
    if all(indices.values()):
        count = sum(len(index["shards"]) for index in indices.values())
        images = " + ".join(short(index["samples"]) for index in indices.values())
        moved = latest(newest(index_path(config, split).parent) for split in indices)
        return Facts("prepare", "shards", count, count, published=True, moved=moved, note=f"{images} images")
    # whose a folder is nothing tells before its index is there: of each split the one that moved last
    times: list[float] = []
    data = local_work(config.work) / "data"
    others = [path for path in Path("outputs").glob("*/data/*/index.json") if path.parents[2].name != config.name]
    theirs = {Path(str(read_json(path).get("location"))).parent.name for path in others}
    for split in indices:
        tars = [
            [when for name, when in written(folder).items() if name.endswith(".tar")]
            for folder in data.glob(f"*/{split}")
            if folder.parent.name not in theirs
        ]
        times += max(tars, key=lambda found: max(found, default=0.0), default=[])
    return Facts(
        "prepare", "shards", len(times), begun=bool(times), moved=latest(times), rate=rate_of(times),
        pictures=config.data.shard_samples, writers=is_held(data / DATA_LOCK),
    )  # fmt: skip


def trained(experiment: Experiment, stage: str, settings: Training | None, folder: Path) -> Facts:
    """A training that publishes into `folder`; without settings its weights come from elsewhere."""
    metrics = read_json(folder / "metrics.json") if (folder / "weights.safetensors").exists() else {}
    own = experiment.states_of(stage) if settings else []
    foreign = bool(metrics) and is_foreign(folder / "curve.csv", bool(settings), own, experiment.states)
    total, pictures = experiment.steps(settings) if settings else (None, None)
    state = max(own, key=lambda state: state.moved, default=None)
    told: dict[str, Any] = {"top1": number(top1_of(metrics))}
    if state and not (state.complete and metrics):
        told = told_by_log(state.log())
    kept = state.checkpoint if state else 0
    if state.complete if state else metrics and not foreign:
        kept = total or 0
    return Facts(
        stage, "steps", max(told.get("done", 0), kept), total, kept,
        begun=state is not None,
        published=bool(metrics),
        foreign=foreign,
        writers=state and state.writers,
        moved=latest([newest(folder), state and state.moved]),
        rate=told["samples"] / pictures if told.get("samples") and pictures else None,
        pictures=pictures,
        loss=told.get("loss"),
        top1=told["top1"],
    )  # fmt: skip


def is_foreign(curve: Path, learned: bool, own: list[State], states: list[State]) -> bool:
    """Whether what is published beside a curve is surely another configuration's.

    It is known by its last epoch's loss, which no two trainings share. What no state is left of counts as
    the configuration's own.

    Args:
        learned: the configuration trains here, so that there are epochs.
        own: its states, of all.
    """
    if not curve.exists():
        return False
    try:
        epochs = read_curve(curve)
    except PipelineError:  # damaged: nothing tells
        return False
    if not (learned and epochs):
        return learned or bool(epochs)
    sources = [state for state in states if _last_loss(state) == epochs[-1].get("loss")]
    told = bool(sources) or any(state.complete for state in own)
    return told and not any(state in own for state in sources)


def _last_loss(state: State) -> str | None:
    """As the curve has it."""
    losses = [str(line["loss"]) for line in state.log() if line["kind"] == "epoch"]
    return losses[-1] if losses else None


def stored(experiment: Experiment, stage: str, spec: StoreSpec) -> Facts:
    """A store of the published teacher's answers, and its manifest."""
    config, samples = experiment.config, [samples for samples in experiment.samples if samples]
    folder, blocks = teacher_logits_folder(config, spec.purpose), spec.views // spec.recipe.block
    manifest, summary = (read_json(folder / f"{name}.json") for name in ("manifest", "summary"))
    published, fingerprint = bool(manifest and summary), str(manifest.get("fingerprint"))
    own = {
        str(attributes.get("fingerprint")): written_units(path, spec.kind, blocks)
        for path, attributes in experiment.stores
        if is_store_of(spec.recipe, experiment.index, attributes) and _same_teacher(config, spec, attributes)
    }
    others = {str(attributes.get("fingerprint")) for _, attributes in experiment.stores} - own.keys()
    same = (manifest.get("views"), manifest.get("kind")) == (spec.views, spec.kind)
    foreign = published and not (same and (fingerprint in own or (not own and fingerprint not in others)))
    units = max(own.values(), key=lambda units: units.moved, default=None)
    total = blocks * len(samples) if samples else None
    note = f"{units.writers} writers" if units and units.writers > 1 else ""
    agreement = number(summary.get("agreement_with_labels"))
    if published and not foreign and agreement is not None:
        note = f"as labelled: {agreement:.1%}".replace("%", " %")
    return Facts(
        stage, "units", len(units.times) if units else (total or 0) * (published and not foreign), total,
        begun=units is not None,
        published=published,
        foreign=foreign,
        writers=units.writers if units else 0,
        moved=latest([newest(folder), units and units.moved]),
        rate=rate_of(units.times) if units else None,
        pictures=spec.recipe.block * sum(samples) / len(samples) if samples else None,
        note=note,
    )  # fmt: skip


def _same_teacher(config: Config, spec: StoreSpec, attributes: dict[str, Any]) -> bool:
    """Whether a store is of the teacher that is published; of any, where none is."""
    weights = read_json(teacher_folder(config, spec.purpose) / "metrics.json").get("weights")
    found = attributes.get("teacher")
    if not isinstance(found, dict) or found.get("size") != config.teacher_size(spec.purpose):
        return False
    named = found.get("model") in (config.teacher.model, config.teacher.weights)
    return named and weights in (None, found.get("weights"))


def evaluated(experiment: Experiment) -> Facts:
    """All models at once, written at the end; the top-1 is the last model's."""
    config, folder = experiment.config, evaluation_folder(experiment.config)
    models = evaluated_models(config)
    metrics = read_json(folder / "metrics.json") if (folder / "table.txt").exists() else {}
    known = {TEACHER, *config.variants, *(f"{name}-{FINETUNED}" for name in config.variants)}
    foreign = bool(metrics) and metrics.keys() & known != models.keys()
    untrained = [name for name, where in models.items() if not (where / "weights.safetensors").exists()]
    last = metrics.get(next(reversed(models), ""))
    heads = [last.get(head) for head in ("mean", "class")] if isinstance(last, dict) else []
    top1 = next((number(head.get("top1")) for head in heads if isinstance(head, dict)), None)
    return Facts(
        "evaluate", "models", len(models) if metrics and not foreign else 0, len(models),
        published=bool(metrics),
        foreign=foreign,
        moved=newest(folder) if metrics else None,
        top1=top1,
        note=f"waits for {', '.join(untrained)}" if untrained else "",
    )  # fmt: skip
