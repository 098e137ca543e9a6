"""Who answers while a student trains: nobody, the store, or the teacher itself."""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.batches.batch import Batch
from pipeline.batches.transfer import send
from pipeline.common.errors import PipelineError
from pipeline.config.paths import store_path
from pipeline.config.schema import Config, Student
from pipeline.config.store_spec import store_spec
from pipeline.models.teacher import TeacherForward, describe_teacher, load_teacher
from pipeline.shards.index import Index
from pipeline.store.encoding import decode_logits
from pipeline.store.manifest import build_manifest, read_manifest
from pipeline.store.reader import Store, StoredPredictions
from pipeline.training.run import NoTeacher, TeacherOutput


@dataclass
class StoredTeacher:
    """Answers out of the store: the teacher itself is never in the loop."""

    store: Store
    kind: str

    def __call__(self, batch: Batch, pictures: torch.Tensor) -> TeacherOutput:
        argmax, payload = read_predictions(self.store, batch, self.kind)
        logits = None
        if payload is not None:  # decoded there: as stored it is a quarter or half of the bytes
            logits = decode_logits(self.kind, send(payload, pictures.device), self.store.classes)
        return TeacherOutput(send(argmax, pictures.device), logits)


@dataclass
class OnlineTeacher:
    """The teacher in the loop over the same groups: the proof of the store, and its baseline."""

    teacher: TeacherForward

    def __call__(self, batch: Batch, pictures: torch.Tensor) -> TeacherOutput:
        logits = self.teacher.logits(pictures, batch.labels.shape[1])
        return TeacherOutput(logits.argmax(1), logits)


def read_predictions(store: Store, batch: Batch, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the store holds for each slot: argmax int64 (G * S,), payload (G * S, width) or None.

    Unused slots hold class 0 and zeros; their weight is 0.

    Raises:
        PipelineError: a unit is missing or damaged, or a group is not the one the teacher saw.
    """
    slots = batch.labels.shape[1]
    argmax = np.zeros((len(batch.items), slots), np.int64)
    payload = None
    for number, (item, members) in enumerate(zip(batch.items, batch.members, strict=True)):
        answers = store.read(item.shard, item.view, kind)
        _compare(store, answers, batch, number)
        argmax[number, : len(members)] = answers.argmax[members]
        if answers.payload is not None:
            if payload is None:
                payload = np.zeros((*argmax.shape, answers.payload.shape[1]), answers.payload.dtype)
            payload[number, : len(members)] = answers.payload[members]
    flat = None if payload is None else torch.from_numpy(payload).flatten(0, 1)
    return torch.from_numpy(argmax).flatten(), flat


def _compare(store: Store, answers: StoredPredictions, batch: Batch, number: int) -> None:
    item, here = batch.items[number], batch.checks[number]
    stored = int(answers.check[item.group])
    if stored != here:
        versions = ", ".join(f"{name} {version}" for name, version in store.attributes["versions"].items())
        raise PipelineError(
            f"{store.path}: group {item.group} of shard {store.index.names[item.shard]}, view {item.view}",
            expected=f"the pictures and mixing that the teacher saw (check {stored:016x}; written with {versions})",
            found=f"check {here:016x}: another order, lambda, partner or pixel",
            do="install the versions that wrote the store, or compute another with these",
        )


def make_teacher(
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
    spec = store_spec(config, purpose)
    if teacher == "online":
        return _online(config, purpose, index, device)
    path = spec.folder / "manifest.json"
    published = None
    if named is None:
        published = read_manifest(path)
        named = store_path(config, published["fingerprint"])
    store = Store.open(named, index, spec.recipe)
    views, kind = spec.views, "argmax" if settings.distillation == "hard" else spec.kind
    # completeness is of the store itself: a manifest cannot know that a unit was deleted since
    whole = build_manifest(store, views, kind)
    if published and published["views"] == views and published != (
        whole if published["kind"] == kind else build_manifest(store, views, published["kind"])
    ):
        raise PipelineError(
            f"{store.path}: the answers",
            expected=f"those that {path} names",
            found="others: the store was computed anew since",
            do="run teacher-logits again, so that its manifest is of this store",
        )
    store.cache_size = settings.open_shards + 4
    return StoredTeacher(store, kind), {"store": store.fingerprint, "kind": kind, "units": whole["units"]}


def _online(config: Config, purpose: str, index: Index, device: torch.device) -> tuple[OnlineTeacher, dict]:
    settings, size = config.teacher_logits, config.teacher_size(purpose)
    model = load_teacher(config, len(index.classes), device, purpose)
    online = OnlineTeacher(TeacherForward(model, settings, size))
    return online, {"online": describe_teacher(config.teacher, model, size), "precision": settings.precision}
