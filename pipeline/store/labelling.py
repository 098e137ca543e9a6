"""Labelling: the teacher's predictions for units of views."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.nn.functional import pad

from pipeline.batches.batch import Batch, mixed
from pipeline.batches.loader import unit_loader
from pipeline.batches.plan import Unit, unit_items
from pipeline.batches.transfer import DeviceToHostCopy, on_device
from pipeline.common.errors import PipelineError
from pipeline.common.progress import progress
from pipeline.config.schema import Config, TeacherLogits
from pipeline.config.store_spec import StoreSpec
from pipeline.models.teacher import TeacherForward, describe_teacher, load_teacher
from pipeline.store.encoding import decode_logits, encode, to_numpy
from pipeline.store.reader import Store
from pipeline.store.sampling import Sampler
from pipeline.views.draw import group_count

Commit = Callable[[Unit, dict[str, np.ndarray], np.ndarray], None]
"""As StoreWriter.write_unit: unit, buffers, group checks."""


class UnitWorker:
    """Renders the views of units, runs the teacher on them, and commits each unit once it is complete."""

    def __init__(
        self, settings: TeacherLogits, store: Store, teacher: TeacherForward, device: torch.device, commit: Commit
    ):
        self.settings, self.teacher, self.device, self.commit = settings, teacher, device, commit
        self.recipe, self.index = store.recipe, store.index
        self.sampler = Sampler(store.index, store.recipe, settings.samples, settings.sample_tau)
        self._buffers: dict[Unit, tuple[dict[str, np.ndarray], np.ndarray]] = {}
        self._remaining: dict[Unit, int] = {}
        """Items of each unit whose predictions have not arrived."""

    def compute(self, units: list[Unit]) -> None:
        """Compute and commit units."""
        samples = self.index.samples
        self._remaining = {unit: len(unit_items(unit, self.recipe, int(samples[unit.shard]))) for unit in units}
        total = sum(int(samples[unit.shard]) for unit in units) * self.recipe.block
        loader = unit_loader(units, self.index, self.recipe, self.settings.workers, self.device.type == "cuda")
        pending = None
        with progress(total, "teacher-logits", "view") as bar:
            for batches in chunked(on_device(loader, self.device), self.settings.batch_groups):
                queued = self.forward(batches)
                if pending:  # collected while the device computes the batches queued after it
                    bar.update(self.collect(*pending))
                pending = queued
            if pending:
                bar.update(self.collect(*pending))

    def forward(self, batches: list[Batch]) -> tuple[list[Batch], DeviceToHostCopy]:
        """Queue a forward pass, padded to `batch_groups` groups: the same shape always runs the same kernels."""
        settings, slots = self.settings, self.recipe.group_size
        pictures = torch.cat([mixed(batch) for batch in batches])
        pictures = pad(pictures, (0, 0, 0, 0, 0, 0, 0, slots * (settings.batch_groups - len(batches))))
        logits = self.teacher.logits(pictures, slots)[: slots * len(batches)]
        finite = (logits.abs() <= torch.finfo(torch.float16).max).all(1)
        samples = self.sampler(batches, logits) if settings.kind == "sampled" else None
        argmax, payload = encode(settings.kind, logits, settings.top_k, samples)
        return batches, DeviceToHostCopy(finite, argmax, *([] if payload is None else [payload]))

    def collect(self, batches: list[Batch], predictions: DeviceToHostCopy) -> int:
        """Wait for predictions and move them into the units' buffers; returns the number of views.

        Raises:
            PipelineError: a logit is not finite in float16.
        """
        finite, argmax, *payload = predictions.get()
        arrays = {"argmax": to_numpy("argmax", argmax)}
        if payload:
            arrays[self.settings.kind] = to_numpy(self.settings.kind, payload[0])
        for number, batch in enumerate(batches):
            first = number * self.recipe.group_size
            place = slice(first, first + batch.views)
            if not finite[place].all():
                raise self._not_finite(batch)
            self._add(batch, {name: array[place] for name, array in arrays.items()})
        return sum(batch.views for batch in batches)

    def _add(self, batch: Batch, predictions: dict[str, np.ndarray]) -> None:
        """Add a group's predictions to its unit's buffers; commit the unit with its last group."""
        item, members = batch.items[0], batch.members[0]
        unit, place = Unit(item.shard, item.view // self.recipe.block), item.view % self.recipe.block
        if unit not in self._buffers:
            self._buffers[unit] = self._allocate(unit, predictions)
        buffers, checks = self._buffers[unit]
        for name, rows in predictions.items():
            buffers[name][place, members] = rows
        checks[place, item.group] = batch.checks[0]
        self._remaining[unit] -= 1
        if self._remaining[unit] == 0:
            self.commit(unit, *self._buffers.pop(unit))

    def _allocate(self, unit: Unit, like: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        block, samples = self.recipe.block, int(self.index.samples[unit.shard])
        buffers = {name: np.zeros((block, samples, *rows.shape[1:]), rows.dtype) for name, rows in like.items()}
        return buffers, np.zeros((block, group_count(samples, self.recipe.group_size)), np.uint64)

    def _not_finite(self, batch: Batch) -> PipelineError:
        item = batch.items[0]
        return PipelineError(
            f"the teacher's logits for group {item.group} of shard {self.index.names[item.shard]}, view {item.view}",
            expected="finite numbers within the range of float16",
            found="NaN, infinity or beyond 65,504",
            do="use teacher_logits.precision float32, or repair the teacher",
        )


def chunked(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Lists of `count` batches; the last may be shorter."""
    stream = iter(batches)
    while chunk := list(islice(stream, count)):
        yield chunk


@dataclass(frozen=True)
class Difference:
    """Differences between a unit as stored and as recomputed."""

    predictions: int
    """Predictions compared."""
    flips: int
    """Predictions with a different argmax."""
    checks: int
    """Groups with different pictures or mixing."""
    largest: float | None
    """Largest difference of two logits; None if the store holds none."""
    draws: int | None = None
    """Views for which different classes were drawn; None for kinds other than sampled."""

    def __str__(self) -> str:
        logits = "" if self.largest is None else f", logits by at most {self.largest:.3g}"
        draws = "" if self.draws is None else f", the drawn classes of {self.draws}"
        return f"{self.flips} of {self.predictions:,} predictions differ, {self.checks} checks{logits}{draws}"


def recompute(
    config: Config, spec: StoreSpec, store: Store, units: list[Unit], device: torch.device
) -> Iterator[tuple[Unit, Difference]]:
    """Compute units again and compare them with the store, writing nothing.

    Raises:
        PipelineError: the teacher is not the store's, or a unit is damaged.
    """
    teacher = load_teacher(config, store.index.classes, device, spec.purpose)
    described = describe_teacher(config.teacher, teacher, spec.teacher_size)
    if described != store.attributes["teacher"]:
        raise PipelineError(
            f"{store.path}: the teacher",
            expected=json.dumps(store.attributes["teacher"]),
            found=json.dumps(described),
            do="use the configuration whose teacher wrote the store",
        )
    forward, computed = TeacherForward(teacher, config.teacher_logits, spec.teacher_size), {}

    def keep(unit: Unit, buffers: dict[str, np.ndarray], checks: np.ndarray) -> None:
        computed[unit] = buffers, checks

    worker = UnitWorker(config.teacher_logits, store, forward, device, keep)
    for unit in units:
        worker.compute([unit])
        yield unit, _compare(store, unit, spec.kind, *computed.pop(unit))


def _compare(store: Store, unit: Unit, kind: str, buffers: dict[str, np.ndarray], checks: np.ndarray) -> Difference:
    flips, changed, largest, draws = 0, 0, None, None
    for place in range(store.recipe.block):
        stored = store.read(unit.shard, unit.block * store.recipe.block + place, kind)
        flips += int((stored.argmax != buffers["argmax"][place]).sum())
        changed += int((stored.check != checks[place]).sum())
        if stored.payload is not None and kind == "sampled":
            draws = (draws or 0) + int((stored.payload != buffers[kind][place]).any(1).sum())
        elif stored.payload is not None:
            both = (torch.tensor(payload) for payload in (stored.payload, buffers[kind][place]))
            was, now = (decode_logits(kind, payload, store.classes) for payload in both)
            largest = max(largest or 0.0, float((was - now).abs().max()))
    return Difference(buffers["argmax"].size, flips, changed, largest, draws)
