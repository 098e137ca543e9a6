"""Label views: the teacher over units, into the store."""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
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
from pipeline.config.paths import teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.models.build import NormalizedModel
from pipeline.models.teacher import TeacherForward, describe_teacher, load_teacher
from pipeline.store.encoding import decode_logits, encode, to_numpy
from pipeline.store.manifest import build_manifest, damaged_units, store_bytes, write_manifest, write_summary
from pipeline.store.reader import Store
from pipeline.store.writer import StoreWriter, sweep_store
from pipeline.views.draw import group_count


def remove_damaged(store: StoreWriter, kind: str, units: list[Unit]) -> None:
    """Read units whole; take back those that are damaged, so that they are computed again."""
    for unit, found in damaged_units(store, units, kind):
        print(f"computed again: {found}")
        store.remove_unit(unit)


def batched(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """So many at a time; the last may be fewer."""
    stream = iter(batches)
    while batch := list(islice(stream, count)):
        yield batch


Commit = Callable[[Unit, dict[str, np.ndarray], np.ndarray], None]
"""What StoreWriter.write_unit takes."""


class UnitWorker:
    """Renders, asks the teacher, and commits unit after unit.

    `own_size` is what the teacher sees, in pixels.
    """

    def __init__(
        self, config: Config, store: Store, teacher: NormalizedModel, own_size: int, device: torch.device, commit: Commit
    ):
        self.commit = commit
        self.settings, self.store, self.device = config.teacher_logits, store, device
        self.recipe, self.index = store.recipe, store.index
        self.teacher = TeacherForward(teacher, self.settings, own_size)
        self.open: dict[Unit, tuple[dict[str, np.ndarray], np.ndarray]] = {}
        self.remaining: dict[Unit, int] = {}

    def compute(self, units: list[Unit]) -> None:
        """Compute and commit the units; each is visible only when it is whole."""
        samples = self.index.samples
        self.remaining = {
            unit: len(unit_items(unit, self.recipe, int(samples[unit.shard]))) for unit in units
        }
        total = sum(int(samples[unit.shard]) for unit in units) * self.recipe.block
        loader = unit_loader(units, self.index, self.recipe, self.settings.workers, self.device.type == "cuda")
        forwards, asked = batched(on_device(loader, self.device), self.settings.batch_groups), None
        with progress(total, "teacher-logits", "view") as bar:
            for batches in forwards:
                following = self.ask(batches)
                if asked:  # kept while the device computes the following forward
                    bar.update(self.keep(*asked))
                asked = following
            if asked:
                bar.update(self.keep(*asked))

    def ask(self, batches: list[Batch]) -> tuple[list[Batch], DeviceToHostCopy]:
        """Queue a forward over the batches; always of the same shape, so that its kernels are the same."""
        settings, slots = self.settings, self.recipe.group_size
        pictures = torch.cat([mixed(batch) for batch in batches])
        pictures = pad(pictures, (0, 0, 0, 0, 0, 0, 0, slots * (settings.batch_groups - len(batches))))
        logits = self.teacher.logits(pictures, slots)[: slots * len(batches)]
        finite = (logits.abs() <= torch.finfo(torch.float16).max).all(1)
        argmax, payload = encode(settings.kind, logits, settings.top_k)
        return batches, DeviceToHostCopy(finite, argmax, *([] if payload is None else [payload]))

    def keep(self, batches: list[Batch], answers: DeviceToHostCopy) -> int:
        """Put what was asked into the units' buffers. Returns how many views that was."""
        finite, argmax, *payload = answers.get()
        argmax = to_numpy("argmax", argmax)
        payload = to_numpy(self.settings.kind, payload[0]) if payload else None
        for number, batch in enumerate(batches):
            first = number * self.recipe.group_size
            place = slice(first, first + batch.views)
            if not finite[place].all():
                raise self._not_finite(batch)
            self._keep(batch, argmax[place], None if payload is None else payload[place])
        return sum(batch.views for batch in batches)

    def _keep(self, batch: Batch, argmax: np.ndarray, payload: np.ndarray | None) -> None:
        """Put a group's answers into its unit's buffers; commit the unit with its last group."""
        item, members = batch.items[0], batch.members[0]
        unit, place = Unit(item.shard, item.view // self.recipe.block), item.view % self.recipe.block
        if unit not in self.open:
            self.open[unit] = self._buffers(unit, payload)
        buffers, checks = self.open[unit]
        buffers["argmax"][place, members] = argmax
        if payload is not None:
            buffers[self.settings.kind][place, members] = payload
        checks[place, item.group] = batch.checks[0]
        self.remaining[unit] -= 1
        if self.remaining[unit] == 0:
            self.commit(unit, *self.open.pop(unit))

    def _buffers(self, unit: Unit, payload: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        block, samples = self.recipe.block, int(self.index.samples[unit.shard])
        buffers: dict[str, np.ndarray] = {"argmax": np.zeros((block, samples), np.uint16)}
        if payload is not None:
            buffers[self.settings.kind] = np.zeros((block, samples, payload.shape[1]), payload.dtype)
        return buffers, np.zeros((block, group_count(samples, self.recipe.group_size)), np.uint64)

    def _not_finite(self, batch: Batch) -> PipelineError:
        item = batch.items[0]
        return PipelineError(
            f"the teacher's logits for group {item.group} of shard {self.index.names[item.shard]}, view {item.view}",
            expected="finite numbers that float16 holds",
            found="NaN, infinity or beyond 65,504",
            do="use teacher_logits.precision float32, or mend the teacher",
        )


@dataclass(frozen=True)
class Difference:
    """Between what a store holds of a unit and what the teacher says now."""

    answers: int
    flips: int
    """Answers whose argmax is another."""
    checks: int
    """Groups whose pictures or mixing are others."""
    largest: float | None
    """Of two logits; None where the store keeps the argmax alone."""

    def __str__(self) -> str:
        logits = "" if self.largest is None else f", logits differ by {self.largest:.3g} at most"
        return f"{self.flips} of {self.answers:,} answers differ, {self.checks} checks{logits}"


def recompute_unit(
    config: Config, purpose: str, store: Store, unit: Unit, kind: str, device: torch.device
) -> Difference:
    """Ask the teacher again about a unit; nothing is written.

    Raises:
        PipelineError: the teacher is not the store's, or the unit is damaged.
    """
    own_size = config.teacher_size(purpose)
    teacher = load_teacher(config, store.classes, device, purpose)
    described = describe_teacher(config.teacher, teacher, own_size)
    if described != store.attributes["teacher"]:
        raise PipelineError(
            f"{store.path}: the teacher",
            expected=json.dumps(store.attributes["teacher"]),
            found=json.dumps(described),
            do="this configuration has another teacher than the store",
        )
    answers: dict[str, np.ndarray] = {}
    checks = np.empty(0)

    def keep(_: Unit, buffers: dict[str, np.ndarray], found: np.ndarray) -> None:
        nonlocal answers, checks
        answers, checks = buffers, found

    UnitWorker(config, store, teacher, own_size, device, keep).compute([unit])
    first, block = unit.block * store.recipe.block, store.recipe.block
    stored = [store.read(unit.shard, view, kind) for view in range(first, first + block)]
    largest = None
    if kind != "argmax":
        largest = max(
            float((_logits(kind, was.payload, store) - _logits(kind, now, store)).abs().max())
            for was, now in zip(stored, answers[kind], strict=True)
        )
    return Difference(
        answers=answers["argmax"].size,
        flips=int(sum((was.argmax != now).sum() for was, now in zip(stored, answers["argmax"], strict=True))),
        checks=int(sum((was.check != now).sum() for was, now in zip(stored, checks, strict=True))),
        largest=largest,
    )


def _logits(kind: str, payload: np.ndarray | None, store: Store) -> torch.Tensor:
    return decode_logits(kind, torch.tensor(payload), store.classes)


def publish(config: Config, purpose: str, store: Store, views: int, verified: Collection[Unit] = ()) -> None:
    """Read a complete store back, then write its manifest and summary into the outputs.

    Args:
        verified: units that were read whole already.

    Raises:
        PipelineError: a unit is damaged: what was written is not what the disk gives.
    """
    kind, folder = config.teacher_logits.kind, teacher_logits_folder(config, purpose)
    start = time.monotonic()
    if bad := damaged_units(store, [unit for unit in store.units(views) if unit not in verified], kind):
        raise PipelineError(
            f"{store.path}: {len(bad)} units are damaged, so the store is not published",
            found=bad[0][1].splitlines()[0],
            do="run teacher-logits again: it computes them again",
        )
    sweep_store(store.path)
    write_manifest(folder / "manifest.json", build_manifest(store, views, kind))
    agreement = _agreement(store, views)
    summary = {
        "rows": len(store.index),
        "views": views,
        "kind": kind,
        "bytes": store_bytes(store.path),
        "agreement_with_labels": agreement,
    }
    write_summary(folder / "summary.json", summary)
    print(
        f"store complete: {summary['rows']:,} rows x {views} views, {summary['bytes'] / 1e6:,.1f} MB;"
        f" the teacher agrees with the label on {agreement:.1%} of the (mixed) views;"
        f" checked in {time.monotonic() - start:.1f} s"
    )


def _agreement(store: Store, views: int) -> float:
    """Share of views whose own label is the teacher's argmax; reads every unit, checksums tested."""
    agree = 0
    for unit in store.units(views):
        agree += int((store.read_unit(unit) == store.index.rows(unit.shard)["label"]).sum())
    return agree / (len(store.index) * views)
