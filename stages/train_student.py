"""A DeiT student, trained from the store and the shards; the teacher is never run."""

import json
from pathlib import Path

import torch

from pipeline.audit import manifest, read_manifest
from pipeline.completion import complete
from pipeline.config import Config, Recipe, Student, result_fields
from pipeline.errors import NotYet, PipelineError, UsageError
from pipeline.files import replacing
from pipeline.layout import (
    answers_folder,
    index_path,
    state_folder,
    store_path,
    student_folder,
)
from pipeline.models import Answering, build_student, describe_teacher, load_teacher
from pipeline.plan import plan_of
from pipeline.ranks import Rank
from pipeline.recipe import recipe_fingerprint
from pipeline.run import Run, describe_run, run_identity
from pipeline.runlog import write_curve
from pipeline.shards import Index
from pipeline.store import Store
from pipeline.strict import fingerprint
from pipeline.teaching import NoTeacher, OnlineTeacher, StoredTeacher
from pipeline.weights import save_weights


def run(
    config: Config,
    device: torch.device,
    name: str,
    student: Student | None = None,
    teacher: str = "stored",
    store: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write outputs/<name>/students/<student>/weights.safetensors, metrics.json and curve.csv.

    Args:
        name: one of `students`.
        student: settings to use instead of those that `name` has.
        teacher: `stored`, or `online`: the teacher in the loop over the same groups.
        store: a store named by hand.

    Raises:
        PipelineError, UsageError: no complete store, another recipe's store, damaged data, ...
    """
    settings = student or config.student_named(name)
    if settings.distillation == "soft" and teacher == "stored" and config.teacher_logits.kind == "argmax":
        raise UsageError(
            f"student {name}: soft distillation", expected="teacher_logits.kind topk, dense8 or dense", found="argmax",
            do="run teacher-logits with such a kind; or use hard distillation, or --teacher online",
        )  # fmt: skip
    train_index, val_index = (Index(index_path(config, split)) for split in ("train", "val"))
    views = config.teacher_logits.views
    try:
        teaching, taught_by = find_teacher(config, settings, "train-student", train_index, device, teacher, store)
    except NotYet as error:
        if not dry_run:
            raise
        print(f"not yet: {error.what}")
        teaching, taught_by = NoTeacher(), None
    model = build_student(settings, config.recipe, len(train_index.classes), config.recipe.size)
    identity = run_identity(
        settings,
        [model],
        student=result_fields(settings),
        recipe=recipe_fingerprint(config.recipe),
        index=train_index.fingerprint,
        views=views,
        teacher=taught_by,
    )
    training = Run(
        name=f"student {name}",
        folder=state_folder(config, fingerprint(identity)),
        identity=identity,
        settings=settings,
        plan=plan_of(train_index, config.recipe, settings, views),
        train=train_index,
        val=val_index,
        model=model,
        size=config.recipe.size,
        crop=config.evaluate.crop,
        teacher=teaching,
        distillation=settings,
        device=device,
    )
    print(describe_run(training))
    if not dry_run:
        finish(training, student_folder(config, name))


def find_teacher(
    config: Config,
    settings: Student,
    purpose: str,
    index: Index,
    device: torch.device,
    teacher: str = "stored",
    named: str | None = None,
) -> tuple[NoTeacher | StoredTeacher | OnlineTeacher, dict | None]:
    """Who answers in training, and what of it the student's weights depend on."""
    if settings.distillation == "none":
        return NoTeacher(), None
    recipe: Recipe = config.recipe if purpose == "train-student" else config.finetune_recipe()
    if teacher == "online":
        return _online(config, purpose, index, device)
    path = answers_folder(config, purpose) / "manifest.json"
    published = None
    if named is None:
        published = read_manifest(path)
        named = store_path(config, published["fingerprint"])
    store = Store.open(named, index, recipe)
    views = config.teacher_logits.views if purpose == "train-student" else config.finetune.views
    kind = "argmax" if settings.distillation == "hard" else config.teacher_logits.kind
    # completeness is of the store itself: a manifest cannot know that a unit was deleted since
    whole = manifest(store, views, kind)
    if published and published["views"] == views and published != (
        whole if published["kind"] == kind else manifest(store, views, published["kind"])
    ):
        raise PipelineError(
            f"{store.path}: the answers",
            expected=f"those that {path} names",
            found="others: the store was computed anew since",
            do="run teacher-logits again, so that its manifest is of this store",
        )
    store.keep = settings.open_shards + 4
    return StoredTeacher(store, kind), {"store": store.fingerprint, "kind": kind, "units": whole["units"]}


def _online(config: Config, purpose: str, index: Index, device: torch.device) -> tuple[OnlineTeacher, dict]:
    settings, size = config.teacher_logits, config.teacher_size(purpose)
    model = load_teacher(config, len(index.classes), device, purpose)
    online = OnlineTeacher(Answering(model, settings, size))
    return online, {"online": describe_teacher(config.teacher, model, size), "precision": settings.precision}


def finish(training: Run, folder: Path) -> None:
    """Train to the end unless that was done before, and publish the results."""
    metrics = complete(training)
    if Rank.start(training.device).rank:
        return  # rank 0 publishes
    with replacing(folder / "weights.safetensors") as temporary:
        save_weights(temporary, training.model.model, {"run": fingerprint(training.identity)})
    write_curve(folder / "curve.csv", training.folder / "log.jsonl", metrics)
    with replacing(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics | {"run": fingerprint(training.identity)}, indent=1) + "\n")
    figures = {key: value for key, value in metrics.items() if not isinstance(value, str)}
    print(f"{training.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
