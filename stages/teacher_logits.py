"""The teacher's answers about views 0..V-1 of every training image, into the store.

Resumable at any moment: what exists is complete, and only missing units are computed. A larger V adds
blocks. Several processes (torchrun, or `--part i/n`) share the units.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.nn.functional import pad

from pipeline.answers import as_stored, decode_logits, encode, row_bytes
from pipeline.audit import damaged, manifest, store_bytes, write_manifest, write_summary
from pipeline.bars import progress
from pipeline.config import Config, Recipe
from pipeline.errors import NotYet, PipelineError
from pipeline.files import replacing
from pipeline.groups import Groups, mixed
from pipeline.layout import UNNEEDED, answers_folder, index_path, store_path
from pipeline.lease import part_lease, part_lock
from pipeline.loader import on_device, unit_loader
from pipeline.meters import Fetched
from pipeline.models import (
    Answering,
    Normalised,
    describe_teacher,
    load_teacher,
)
from pipeline.plan import Unit, unit_items
from pipeline.recipe import group_count
from pipeline.shards import Index
from pipeline.store import Identity, Store
from pipeline.store_writer import StoreWriter, sweep_store


def run(
    config: Config,
    device: torch.device,
    purpose: str = "train-student",
    part: tuple[int, int] | None = None,
    dry_run: bool = False,
    break_lock: bool = False,
) -> None:
    """Fill the store for `train-student` or, at the higher resolution, for `finetune`.

    Raises:
        PipelineError: damaged shards, a full disk, a teacher that answers NaN.
        UsageError: another process writes the same part, or divides the store into another number of parts.
    """
    index = Index(index_path(config, "train"))
    recipe, views, own_size = _purpose(config, purpose)
    try:
        teacher = load_teacher(config, len(index.classes), device, purpose)
    except NotYet as error:
        if not dry_run:
            raise
        print(describe(config, index, recipe, views, "a store that is named when the teacher is there"))
        print(f"not yet: {error}")
        return
    identity = Identity(index.fingerprint, recipe, describe_teacher(config.teacher, teacher, own_size))
    path, settings = store_path(config, identity.fingerprint), config.teacher_logits
    print(describe(config, index, recipe, views, path))
    if dry_run:
        return
    number, parts = part or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    asked = (identity, index, views, settings.kind, settings.top_k, settings.precision)
    # complete, it needs no lock, which a read-only disk has no place for
    store, bad = StoreWriter.whole(path, *asked), []
    verified: list[Unit] = []
    if store and number and not part:
        print("the store is complete; the first process of the job publishes it")
        return
    if store:
        verified = store.units(views)[number::parts] if part else store.units(views)
        bad = [unit for unit, _ in damaged(store, verified, settings.kind)]
    if bad or not store:
        with part_lease(path, number, parts, f"part {number} of {parts} of teacher-logits", break_lock):
            sweep_store(path, part_lock(path, number, parts))
            store = StoreWriter.create(path, *asked)
            # by its place among all units: other parts commit theirs meanwhile
            own = {*store.units(views)[number::parts], *bad}
            remove_damaged(store, settings.kind, bad)
            missing = [unit for unit in store.missing(views, settings.kind) if unit in own]
            if missing:
                UnitWorker(config, store, teacher, own_size, device, store.write_unit).compute(missing)
        if store.missing(views, settings.kind):
            print("this part is done; the last part to finish writes the manifest")
            return
    publish(config, purpose, store, views, set(verified) - set(bad))


def mark_unneeded(config: Config, purpose: str) -> None:
    """In the place of manifest and summary, for DVC: no student listens, so nothing is computed."""
    folder = answers_folder(config, purpose)
    write_manifest(folder / "manifest.json", UNNEEDED)
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(UNNEEDED) + "\n")
    print(f"teacher-logits for {purpose}: not needed, no student listens to a teacher")


def remove_damaged(store: StoreWriter, kind: str, units: list[Unit]) -> None:
    """Read units whole; take back those that are damaged, so that they are computed again."""
    for unit, found in damaged(store, units, kind):
        print(f"computed again: {found}")
        store.remove_unit(unit)


def _purpose(config: Config, purpose: str) -> tuple[Recipe, int, int]:
    size = config.teacher_size(purpose)
    if purpose == "train-student":
        return config.recipe, config.teacher_logits.views, size
    return config.finetune_recipe(), config.finetune.views, size


def describe(config: Config, index: Index, recipe: Recipe, views: int, path: str) -> str:
    """What would be done: units, views, bytes, folder."""
    settings, classes = config.teacher_logits, len(index.classes)
    shards, blocks = len(index.names), views // recipe.block
    rows = shards * int(index.samples.max())
    groups = shards * (-(-int(index.samples.max()) // recipe.group_size) + 3)
    size = views * (rows * row_bytes(settings.kind, classes, settings.top_k) + groups * 8)
    fewer = ""
    if settings.kind == "topk" and classes < settings.top_k:
        fewer = f"  top_k {settings.top_k}: there are {classes} classes, and all are kept"
    return (
        f"teacher-logits: {len(index):,} images x {views} views at {recipe.size} px = {len(index) * views:,} views,"
        f" {shards} shards x {blocks} blocks = {shards * blocks:,} units\n"
        f"  {settings.kind}: about {size / 1e6:,.1f} MB, {size / max(views * len(index), 1):.2f} bytes a view: {path}"
        + (f"\n{fewer}" * bool(fewer))
    )


def batched(groups: Iterable[Groups], count: int) -> Iterator[list[Groups]]:
    """So many at a time; the last may be fewer."""
    stream = iter(groups)
    while batch := list(islice(stream, count)):
        yield batch


Commit = Callable[[Unit, dict[str, np.ndarray], np.ndarray], None]
"""What StoreWriter.write_unit takes."""


class UnitWorker:
    """Renders, asks the teacher, and commits unit after unit.

    `own_size` is what the teacher sees, in pixels.
    """

    def __init__(
        self, config: Config, store: Store, teacher: Normalised, own_size: int, device: torch.device, commit: Commit
    ):
        self.commit = commit
        self.settings, self.store, self.device = config.teacher_logits, store, device
        self.recipe, self.index = store.recipe, store.index
        self.teacher = Answering(teacher, self.settings, own_size)
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
        batches, asked = batched(on_device(loader, self.device), self.settings.batch_groups), None
        with progress(total, "teacher-logits", "view") as bar:
            for batch in batches:
                following = self.ask(batch)
                if asked:  # kept while the device computes the following batch
                    bar.update(self.keep(*asked))
                asked = following
            if asked:
                bar.update(self.keep(*asked))

    def ask(self, batch: list[Groups]) -> tuple[list[Groups], Fetched]:
        """Queue a forward over the groups; always of the same shape, so that its kernels are the same."""
        settings, slots = self.settings, self.recipe.group_size
        pictures = torch.cat([mixed(groups) for groups in batch])
        pictures = pad(pictures, (0, 0, 0, 0, 0, 0, 0, slots * (settings.batch_groups - len(batch))))
        logits = self.teacher.logits(pictures, slots)[: slots * len(batch)]
        finite = (logits.abs() <= torch.finfo(torch.float16).max).all(1)
        argmax, payload = encode(settings.kind, logits, settings.top_k)
        return batch, Fetched(finite, argmax, *([] if payload is None else [payload]))

    def keep(self, batch: list[Groups], answers: Fetched) -> int:
        """Put what was asked into the units' buffers. Returns how many views that was."""
        finite, argmax, *payload = answers.get()
        argmax = as_stored("argmax", argmax)
        payload = as_stored(self.settings.kind, payload[0]) if payload else None
        for number, groups in enumerate(batch):
            first = number * self.recipe.group_size
            place = slice(first, first + groups.views)
            if not finite[place].all():
                raise self._not_finite(groups)
            self._keep(groups, argmax[place], None if payload is None else payload[place])
        return sum(groups.views for groups in batch)

    def _keep(self, groups: Groups, argmax: np.ndarray, payload: np.ndarray | None) -> None:
        """Put a group's answers into its unit's buffers; commit the unit with its last group."""
        item, members = groups.items[0], groups.members[0]
        unit, place = Unit(item.shard, item.view // self.recipe.block), item.view % self.recipe.block
        if unit not in self.open:
            self.open[unit] = self._buffers(unit, payload)
        buffers, checks = self.open[unit]
        buffers["argmax"][place, members] = argmax
        if payload is not None:
            buffers[self.settings.kind][place, members] = payload
        checks[place, item.group] = groups.checks[0]
        self.remaining[unit] -= 1
        if self.remaining[unit] == 0:
            self.commit(unit, *self.open.pop(unit))

    def _buffers(self, unit: Unit, payload: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        block, samples = self.recipe.block, int(self.index.samples[unit.shard])
        buffers: dict[str, np.ndarray] = {"argmax": np.zeros((block, samples), np.uint16)}
        if payload is not None:
            buffers[self.settings.kind] = np.zeros((block, samples, payload.shape[1]), payload.dtype)
        return buffers, np.zeros((block, group_count(samples, self.recipe.group_size)), np.uint64)

    def _not_finite(self, groups: Groups) -> PipelineError:
        item = groups.items[0]
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
    _, _, own_size = _purpose(config, purpose)
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
    kind, folder = config.teacher_logits.kind, answers_folder(config, purpose)
    start = time.monotonic()
    if bad := damaged(store, [unit for unit in store.units(views) if unit not in verified], kind):
        raise PipelineError(
            f"{store.path}: {len(bad)} units are damaged, so the store is not published",
            found=bad[0][1].splitlines()[0],
            do="run teacher-logits again: it computes them again",
        )
    sweep_store(store.path)
    write_manifest(folder / "manifest.json", manifest(store, views, kind))
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
