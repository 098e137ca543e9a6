"""The parts of bench/gpu.py about labelling: its speed, and whether it computes the same bits again."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from lab import BLOCK, Lab
from results import head, print_goals, ratios, row, spread
from steps import synchronize, timed

from pipeline.batches.batch import Batch
from pipeline.batches.loader import unit_loader
from pipeline.batches.plan import Unit
from pipeline.models.teacher import TeacherForward
from pipeline.store import labelling
from pipeline.store.reader import StoreIdentity
from pipeline.store.writer import StoreWriter

BIG, SMALL = Unit(0, 0), Unit(2, 0)
Loader = Callable[..., Iterable[Batch]]


def unit_store(lab: Lab, kind: str) -> StoreWriter:
    identity = StoreIdentity(lab.index.fingerprint, lab.recipe, {"model": "random"})
    return StoreWriter.create(str(lab.root / f"{kind}.zarr"), identity, lab.index, BLOCK, kind, 1, "bfloat16")


def label(
    lab: Lab, store: StoreWriter, unit: Unit, kind: str, loader: Loader, workers: int = 0,
    commit: labelling.Commit | None = None,
) -> float:  # fmt: skip
    """Seconds of UnitWorker.compute from the arrival of its first batch on; `loader` replaces unit_loader."""
    settings = lab.teacher_logits.model_copy(update={"kind": kind, "workers": workers})
    started, teacher = [], TeacherForward(lab.teacher, settings, lab.recipe.size)

    def noting(*arguments: Any, **named: Any) -> Iterable[Batch]:
        for number, batch in enumerate(loader(*arguments, **named), 1):
            if number == lab.groups:
                started.append(time.perf_counter())
            yield batch

    real, labelling.unit_loader = labelling.unit_loader, noting
    try:
        commit = commit or store.write_unit
        labelling.UnitWorker(settings, store, teacher, lab.device, commit).compute([unit])
    finally:
        labelling.unit_loader = real
    synchronize(lab.device)
    return time.perf_counter() - started[0]


def render(lab: Lab) -> float:
    """Seconds in which the loader alone renders a unit, from its first batch on."""
    start = 0.0
    for number, _ in enumerate(unit_loader([BIG], lab.index, lab.recipe, lab.workers, lab.pin), 1):
        if number == lab.groups:
            start = time.perf_counter()
    return time.perf_counter() - start


def rendered(lab: Lab, unit: Unit) -> tuple[list[Batch], Loader]:
    """A unit's rendered batches, and a loader that gives them out."""
    batches = list(unit_loader([unit], lab.index, lab.recipe, lab.renderers, lab.pin))
    return batches, lambda *_, **__: iter(batches)


def teacher_part(lab: Lab) -> None:
    batches, ready = rendered(lab, BIG)
    store, views = unit_store(lab, "argmax"), sum(batch.views for batch in batches)
    forward = lab.forward(batches[: lab.groups])
    timed(forward, 2, lab.device)  # compiles
    before = lab.allocated()
    label(lab, store, BIG, "argmax", ready)
    peak = lab.allocated(peak=True) - before
    times = max(1, round(lab.seconds / timed(forward, 3, lab.device)))
    found = {name: [] for name in ("forward", "ready", "real", "loader")}
    for _ in range(min(lab.rounds, 3)):
        found["forward"].append(lab.views / timed(forward, times, lab.device))
        found["ready"].append(views / label(lab, store, BIG, "argmax", ready))
        found["real"].append(views / label(lab, store, BIG, "argmax", unit_loader, lab.workers))
        found["loader"].append(views / render(lab))
    print_teacher(lab, found, views, peak)


def print_teacher(lab: Lab, found: dict[str, list[float]], views: int, peak: float) -> None:
    shares = {name: ratios(rates, found["forward"]) for name, rates in found.items()}
    head(f"{lab.recipe.size} px, {lab.views} views per forward, {views:,} per unit", "views/s", "/ forward", "MiB")
    row("forward alone, pictures on the device", spread(found["forward"]), "1", "")
    row("UnitWorker, groups rendered before", spread(found["ready"]), spread(shares["ready"]), f"{peak:.0f}")
    row(f"UnitWorker, loader of {lab.workers} workers", spread(found["real"]), spread(shares["real"]), "")
    row("that loader alone", spread(found["loader"]), spread(shares["loader"]), "")
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    print(f"\nThe {'loader' if middle['loader'] < middle['ready'] else 'device'} limits, by the rates of both.")
    goals = [("groups rendered before", "ready"), ("real loader", "real")]
    print_goals([(f"UnitWorker / forward, {w}", "at least", 0.9, statistics.median(shares[n])) for w, n in goals])


def bits_part(lab: Lab) -> None:
    store, logits = unit_store(lab, "dense"), {}
    _, ready = rendered(lab, SMALL)
    runs: dict[str, tuple[Loader, int]] = {"groups rendered before": (ready, 0), "the same again": (ready, 0)}
    runs |= {f"loader, workers: {count}": (unit_loader, count) for count in sorted({1, 2, lab.workers})}
    for name, (loader, workers) in runs.items():

        def keep(_: Unit, buffers: dict[str, np.ndarray], checks: np.ndarray, name: str = name) -> None:
            logits[name] = buffers["dense"]

        label(lab, store, SMALL, "dense", loader, workers, keep)
    first = logits["groups rendered before"]
    views = first.shape[0] * first.shape[1]
    head(f"a unit of {views:,} views, against its first run", "rows that differ", "argmax that differ", "largest difference")
    for name, found in logits.items():
        other = (found.view(np.uint16) != first.view(np.uint16)).any(2).sum()
        flips = (found.argmax(2) != first.argmax(2)).sum()
        row(name, f"{other}", f"{flips}", f"{np.abs(found.astype(np.float32) - first.astype(np.float32)).max():.3g}")
