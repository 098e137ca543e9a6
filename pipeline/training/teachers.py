"""Where a student's training gets the teacher's predictions from: the store, or the teacher in the loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.batches.batch import Batch
from pipeline.batches.transfer import send
from pipeline.common.errors import NotReady, PipelineError, UsageError
from pipeline.common.files import read_json_object
from pipeline.config.paths import store_path
from pipeline.config.schema import Config, Student
from pipeline.config.store_spec import COMPUTED_WITH, StoreSpec, store_spec
from pipeline.models.class_map import check_same_classes
from pipeline.models.provenance import architecture_differences
from pipeline.models.teacher import TeacherForward, describe_teacher, load_teacher
from pipeline.models.weights import DESCRIPTION, read_metadata
from pipeline.shards.index import Index
from pipeline.store.encoding import decode_logits, decode_samples
from pipeline.store.manifest import build_manifest, is_manifest_of, read_manifest, require_fetched
from pipeline.store.reader import Store, StoredPredictions
from pipeline.store.sampling import Sampler, check_sampling
from pipeline.training.identity import teacher_fingerprint
from pipeline.training.origin import require_teacher
from pipeline.training.run import NoTeacher, TeacherOutput


@dataclass
class StoredTeacher:
    """Predictions from the store; the teacher itself is not run."""

    store: Store
    kind: str
    reuse_view: int | None = None
    """See `read_predictions`."""

    def __call__(self, batch: Batch, pictures: torch.Tensor) -> TeacherOutput:
        argmax, payload = read_predictions(self.store, batch, self.kind, self.reuse_view)
        logits = samples = None
        if payload is not None:  # decoded on the device: encoded, it has a quarter or half of the bytes to copy
            payload = send(payload, pictures.device)
            if self.kind == "sampled":
                samples = decode_samples(payload)
            else:
                logits = decode_logits(self.kind, payload, self.store.classes)
        return TeacherOutput(send(argmax, pictures.device), logits, samples)


@dataclass
class OnlineTeacher:
    """The teacher in the loop, over the same groups: the reference for the store."""

    teacher: TeacherForward
    sampler: Sampler | None = None
    """Draws the classes that a store would hold; None: the logits are used."""

    def __call__(self, batch: Batch, pictures: torch.Tensor) -> TeacherOutput:
        logits = self.teacher.logits(pictures, batch.labels.shape[1])
        if self.sampler is None:
            return TeacherOutput(logits.argmax(1), logits)
        if not logits.isfinite().all():  # classes drawn from them would look like any others
            raise PipelineError(
                f"the teacher's logits for groups {', '.join(map(str, batch.items))}", expected="finite numbers",
                found="NaN or infinity", do="use teacher_logits.precision float32, or repair the teacher",
            )  # fmt: skip
        return TeacherOutput(logits.argmax(1), None, self.sampler([batch], logits))


def read_predictions(
    store: Store, batch: Batch, kind: str, reuse_view: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The store's predictions for each slot of a batch: argmax int64 (G * S,), payload (G * S, width) or None.

    G groups of S slots; unused slots hold class 0 and zeros, and have weight 0.

    Args:
        reuse_view: a view whose predictions of the same samples are returned for every view. The checks compared are
            still those of the batch's own views, so samples, their order and pixels are as in any other run.

    Raises:
        PipelineError: a unit is missing or damaged, or a group is not the one the teacher saw.
    """
    slots = batch.labels.shape[1]
    argmax = np.zeros((len(batch.items), slots), np.int64)
    payload = None
    for number, (item, members) in enumerate(zip(batch.items, batch.members, strict=True)):
        stored = store.read(item.shard, item.view, kind if reuse_view is None else "argmax")
        _compare_check(store, stored, batch, number)
        if reuse_view is not None:
            stored = store.read(item.shard, reuse_view, kind)
        argmax[number, : len(members)] = stored.argmax[members]
        if stored.payload is not None:
            if payload is None:
                payload = np.zeros((*argmax.shape, stored.payload.shape[1]), stored.payload.dtype)
            payload[number, : len(members)] = stored.payload[members]
    flat = None if payload is None else torch.from_numpy(payload).flatten(0, 1)
    return torch.from_numpy(argmax).flatten(), flat


def _compare_check(store: Store, predictions: StoredPredictions, batch: Batch, number: int) -> None:
    """Refuse a group of the batch whose check differs from the one that the teacher's group had."""
    item, here = batch.items[number], batch.checks[number]
    stored = int(predictions.check[item.group])
    if stored != here:
        versions = ", ".join(f"{name} {version}" for name, version in store.attributes["versions"].items())
        raise PipelineError(
            f"{store.path}: group {item.group} of shard {store.index.names[item.shard]}, view {item.view}",
            expected=f"the pictures and mixing that the teacher saw (check {stored:016x}; written with {versions})",
            found=f"check {here:016x}: a different order, lambda, partner or pixel",
            do="install the versions that wrote the store, or compute a new store with these",
        )


def create_teacher(
    config: Config,
    settings: Student,
    purpose: str,
    index: Index,
    device: torch.device,
    teacher: str = "stored",
    store: str | None = None,
) -> tuple[NoTeacher | StoredTeacher | OnlineTeacher, dict[str, Any] | None]:
    """The teacher of a run, and its part of the run's identity.

    Args:
        settings: the student's.
        purpose: train-student or finetune.
        teacher: `stored` or `online`.
        store: path of a store; None: the published one.

    Raises:
        NotReady: there is no store or no teacher yet.
        PipelineError: the store is incomplete, or differs from its manifest.
        UsageError: it belongs to another index or recipe, or its classes were drawn at another temperature; reuse_view
            with a teacher in the loop or in fine-tuning.
    """
    if settings.distillation == "none":
        return NoTeacher(), None
    _check_tau(config, settings)
    if settings.reuse_view is not None and (teacher == "online" or purpose == "finetune"):
        raise UsageError(f"reuse_view {settings.reuse_view}", expected="training from the store of train-student",
                         found="fine-tuning" if purpose == "finetune" else "--teacher online", do="set reuse_view to null")  # fmt: skip
    if teacher == "online":
        return _online_teacher(config, settings, purpose, index, device)
    return _stored_teacher(config, settings, purpose, index, store)


def _stored_teacher(
    config: Config, settings: Student, purpose: str, index: Index, path: str | None
) -> tuple[StoredTeacher, dict[str, Any]]:
    spec = store_spec(config, purpose)
    manifest_path, published = spec.folder / "manifest.json", None
    if path is None:
        published = read_manifest(manifest_path)
        path = store_path(config, published["fingerprint"])
    store = Store.open(path, index, spec.recipe)
    if published:
        check_origin(config, store, spec)
    views, kind = spec.views, spec.kind_for(settings.distillation)
    # reads the store itself: the manifest does not show whether a unit was deleted since
    manifest = build_manifest(store, views, kind)
    if published and published["views"] == views and not is_manifest_of(
        published, manifest if published["kind"] == kind else build_manifest(store, views, published["kind"])
    ):
        raise PipelineError(
            f"{store.path}: the teacher predictions",
            expected=f"those that {manifest_path} names",
            found="other predictions: the store was recomputed since",
            do=f"run: {spec.command}, which writes the manifest of this store",
        )
    if kind == "sampled":
        check_sampling(store, spec)
    order = config.finetune if purpose == "finetune" else settings
    store.cache_size = (order.open_shards + 4) * (1 if settings.reuse_view is None else 2)
    identity = {"store": store.fingerprint, "kind": kind, "units": manifest["units"]}
    if settings.reuse_view is not None:
        identity["reuse_view"] = settings.reuse_view
    return StoredTeacher(store, kind, settings.reuse_view), identity


def check_origin(config: Config, store: Store, spec: StoreSpec) -> None:
    """Refuse a published store whose teacher, or the place it was fetched from, differs from the configuration.

    Raises:
        NotReady, UsageError: they differ.
    """
    require_fetched(spec)
    if not spec.fetch:
        require_teacher(config, store.index.fingerprint, spec.purpose)
        _check_classes(spec, store.index.classes)
        check_same_teacher(config, store, spec)
        check_recorded_teacher(config, store.index.fingerprint, spec)


def check_recorded_teacher(config: Config, index: str, spec: StoreSpec) -> None:
    """If the teacher's weights are gone, compare what summary.json says about the teacher with the configuration.

    Raises:
        NotReady: the store is of a different teacher.
    """
    expected = teacher_fingerprint(config, index, spec.purpose)
    recorded = read_json_object(spec.folder / "summary.json").get(COMPUTED_WITH)  # null, or no key: nothing to compare
    if recorded not in (None, expected) and not (spec.teacher_folder / "weights.safetensors").exists():
        raise NotReady(
            f"{spec.folder / 'manifest.json'}: the store of another teacher", expected="predictions of the configured teacher",
            found="those of a teacher with other settings, whose weights are gone",
            do=f"run: {spec.commands} (or dvc repro); or set the configuration back",
        )  # fmt: skip


def _check_classes(spec: StoreSpec, classes: Sequence[str]) -> None:
    """Refuse a published teacher with class names other than the index's: a class map may select its outputs by name.

    Raises:
        NotReady: they differ.
    """
    path = spec.teacher_folder / "weights.safetensors"
    described = read_metadata(path).get(DESCRIPTION) if path.exists() else None
    if isinstance(described, dict) and "classes" in described:
        do = f"run: {spec.commands} (or dvc repro)"
        check_same_classes(f"{path}: a teacher", described["classes"], classes, do, NotReady)


def check_same_teacher(config: Config, store: Store, spec: StoreSpec) -> None:
    """Refuse a published store whose teacher is not the published one, or was run with different settings.

    Raises:
        UsageError: they differ.
    """
    own = read_json_object(spec.teacher_folder / "metrics.json").get("weights")
    if own is None:
        return  # the store may be fetched
    teacher = store.attributes["teacher"]
    stored = {"weights": teacher.get("weights"), "size": teacher.get("size"), "precision": store.attributes["precision"]}
    expected = {"weights": own, "size": spec.teacher_size, "precision": spec.precision}
    wrong = [key for key, value in expected.items() if stored[key] not in (None, value)]
    found = [f"{key}: {stored[key]}, {expected[key]}" for key in wrong] + architecture_differences(config.teacher, teacher)
    if found:
        do = f"run: {spec.command}; or set teacher_logits.fetch or finetune.fetch, if the store was fetched"
        if wrong == ["precision"] and len(found) == 1:
            do = f"set teacher_logits.precision to {stored['precision']}; or remove the store and run: {spec.command}"
        raise UsageError(
            f"{store.path}: its teacher", expected="the published teacher, run as configured",
            found=f"{'; '.join(found[:5])} (store, configured)", do=do,
        )  # fmt: skip


def _online_teacher(
    config: Config, student: Student, purpose: str, index: Index, device: torch.device
) -> tuple[OnlineTeacher, dict[str, Any]]:
    settings, spec = config.teacher_logits, store_spec(config, purpose)
    require_teacher(config, index.fingerprint, purpose)
    model = load_teacher(config, index.classes, device, purpose)
    online = OnlineTeacher(TeacherForward(model, settings, spec.teacher_size))
    described = describe_teacher(config.teacher, model, spec.teacher_size)
    identity: dict[str, Any] = {"online": described, "precision": settings.precision}
    if student.distillation == "soft" and spec.sampling is not None:
        online.sampler = Sampler(index, spec.recipe, settings.samples, settings.sample_tau)
        identity["sampling"] = spec.sampling
    return online, identity


def _check_tau(config: Config, student: Student) -> None:
    """Refuse a student whose temperature differs from the one at which classes are drawn."""
    settings = config.teacher_logits
    if (settings.kind, student.distillation) == ("sampled", "soft") and student.tau != settings.sample_tau:
        raise UsageError(
            "the student's tau", expected=f"teacher_logits.sample_tau, {settings.sample_tau:g}, with kind sampled",
            found=f"{student.tau:g}", do="change one of them, or use a different kind: logits allow any temperature",
        )  # fmt: skip
