"""What a GPU makes of the teacher and of a student's step: one report, meant to take seven minutes on an H200.

\b
* teacher: views/s of pipeline.store.labelling.UnitWorker, committing to a store, with groups that were rendered
  before and with the real loader, beside the bare forward of the same teacher on pictures on the device;
* bits: a unit's float16 logits, computed again, and with other numbers of workers;
* repeats: steps of a student and of a teacher that is trained, done twice from the same weights, without and with
  `deterministic`: how many weights differ, and what a step takes;
* loader: the step with the store from the real loader, of the first case with the student `small`;
* each of --cases, a student at a size: the step of pipeline.training.trainer.Trainer without distillation, with the
  store, and with the teacher in the loop, on groups in the host's pinned memory (copied as in training) and
  on the device; and the teacher's forward alone. Bound: 1 + forward / step without distillation, groups on
  the device; FLOP bound: 1 + T / (3 S), T and S being multiply-adds of a forward.

bf16; distilled students, hard. Drop-path, AdamW, the EMA of the weights and, with the store, the second head's
loss are in a step. The teacher is channels_last, in the loop too; with --compile teacher and students are
compiled, before anything is timed. Seconds are means of many steps in a row between two synchronisations; ways
take turns and change places; ratios are taken within a round. Waits: how much of the step the host waits for
the device; near none, it is the host that limits. Host: what a step costs the host without that. MiB: the most
that was allocated beyond what was before the way's model was made, and the teacher's weights where it is in the
loop. Data, weights and answers are random.

\b
    python bench/gpu.py
    python bench/gpu.py --only bits,small@224 --no-compile
"""


import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports it

import gc
import itertools
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
from experiment import (
    Clocked,
    Material,
    Stepping,
    flop_bound,
    in_turns,
    make_material,
    make_trainer,
    print_goals,
    ratios,
    synchronize,
    timed,
)
from lab import BLOCK, CLASSES, Lab, allocated, attempt, head, make_lab, reason, row
from machine import conditions, spread
from repeats import repeats_part

from pipeline.batches.batch import Batch, mixed
from pipeline.batches.loader import step_loader, unit_loader
from pipeline.batches.plan import Unit
from pipeline.batches.transfer import on_device
from pipeline.cli.options import DEVICE, find_device
from pipeline.config.schema import Config, Finetune, Student
from pipeline.models.build import build_student
from pipeline.models.teacher import TeacherForward
from pipeline.store.reader import StoreIdentity
from pipeline.store.writer import StoreWriter
from pipeline.training.run import NoTeacher
from pipeline.training.teachers import OnlineTeacher, StoredTeacher
from stages import teacher_logits as stage

BIG, SMALL = Unit(0, 0), Unit(2, 0)
STEPS = 7  # rendered; a prime, so that a worker does not meet the same one again and again

# the teacher


def unit_store(lab: Lab, kind: str) -> StoreWriter:
    identity = StoreIdentity(lab.index.fingerprint, lab.recipe, {"model": "random"})
    return StoreWriter.create(str(lab.root / f"{kind}.zarr"), identity, lab.index, BLOCK, kind, 1, "bfloat16")


def compute(
    lab: Lab, store: StoreWriter, unit: Unit, kind: str, loader: Callable, workers: int = 0, commit=None
) -> float:
    """Seconds of UnitWorker.compute from the arrival of its first batch on; `loader` stands for unit_loader."""
    settings = lab.answering.model_copy(update={"kind": kind, "workers": workers})
    config = Config(recipe=lab.recipe, teacher_logits=settings, finetune=Finetune(views=BLOCK))
    started = []

    def noting(*arguments, **named) -> Iterable[Batch]:
        for number, batch in enumerate(loader(*arguments, **named), 1):
            if number == lab.groups:
                started.append(time.perf_counter())
            yield batch

    real, stage.unit_loader = stage.unit_loader, noting
    try:
        stage.UnitWorker(config, store, lab.teacher, None, lab.device, commit or store.write_unit).compute([unit])
    finally:
        stage.unit_loader = real
    synchronize(lab.device)
    return time.perf_counter() - started[0]


def render(lab: Lab) -> float:
    """Seconds in which the loader alone renders a unit, from its first batch on."""
    for number, _ in enumerate(unit_loader([BIG], lab.index, lab.recipe, lab.workers, lab.pin), 1):
        if number == lab.groups:
            start = time.perf_counter()
    return time.perf_counter() - start


def handing(lab: Lab, unit: Unit) -> tuple[list[Batch], Callable]:
    """A unit's groups, rendered; and what hands them out again in place of a loader."""
    batches = list(unit_loader([unit], lab.index, lab.recipe, lab.renderers, lab.pin))
    return batches, lambda *_, **__: iter(batches)


def forward_of(lab: Lab, batches: list[Batch]) -> Callable[[], torch.Tensor]:
    """The teacher's bare forward of their pictures, which lie on the device as UnitWorker would have them."""
    pictures = torch.cat([mixed(batch.to(lab.device)) for batch in batches])
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    return partial(TeacherForward(lab.teacher, lab.answering).logits, pictures, lab.recipe.group_size)


def teacher_part(lab: Lab) -> None:
    resident, handed = handing(lab, BIG)
    store, views = unit_store(lab, "argmax"), sum(batch.views for batch in resident)
    forward = forward_of(lab, resident[: lab.groups])
    timed(forward, 2, lab.device)  # compiles
    before = allocated(lab.device)
    compute(lab, store, BIG, "argmax", handed)
    peak = allocated(lab.device, peak=True) - before
    times = max(1, round(lab.seconds / timed(forward, 3, lab.device)))
    found = {name: [] for name in ("forward", "resident", "real", "loader")}
    for _ in range(min(lab.rounds, 3)):
        found["forward"].append(lab.views / timed(forward, times, lab.device))
        found["resident"].append(views / compute(lab, store, BIG, "argmax", handed))
        found["real"].append(views / compute(lab, store, BIG, "argmax", unit_loader, lab.workers))
        found["loader"].append(views / render(lab))
    print_teacher(lab, found, views, peak)


def print_teacher(lab: Lab, found: dict[str, list[float]], views: int, peak: float) -> None:
    shares = {name: ratios(rates, found["forward"]) for name, rates in found.items()}
    head(f"{lab.recipe.size} px, {lab.views} views a forward, {views:,} a unit", "views/s", "of the forward", "MiB")
    row("forward alone, pictures on the device", spread(found["forward"]), "1", "")
    row("UnitWorker, groups rendered before", spread(found["resident"]), spread(shares["resident"]), f"{peak:.0f}")
    row(f"UnitWorker, loader of {lab.workers} workers", spread(found["real"]), spread(shares["real"]), "")
    row("that loader alone", spread(found["loader"]), spread(shares["loader"]), "")
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    print(f"\nThe {'loader' if middle['loader'] < middle['resident'] else 'device'} limits, by the two's own rates.")
    goals = [("groups rendered before", "resident"), ("real loader", "real")]
    print_goals([(f"UnitWorker / forward, {w}", "at least", 0.9, statistics.median(shares[n])) for w, n in goals])


def bits_part(lab: Lab) -> None:
    store, logits = unit_store(lab, "dense"), {}
    _, handed = handing(lab, SMALL)
    runs = {"groups rendered before": (handed, 0), "the same again": (handed, 0)}
    runs |= {f"loader, workers: {count}": (unit_loader, count) for count in sorted({1, 2, lab.workers})}
    for name, (loader, workers) in runs.items():
        keep = lambda _, buffers, checks, name=name: logits.update({name: buffers["dense"]})  # noqa: E731
        compute(lab, store, SMALL, "dense", loader, workers, keep)
    first = logits["groups rendered before"]
    views = first.shape[0] * first.shape[1]
    head(f"a unit of {views:,} views, beside its first run", "rows of other bits", "other argmax", "largest difference")
    for name, found in logits.items():
        other = (found.view(np.uint16) != first.view(np.uint16)).any(2).sum()
        flips = (found.argmax(2) != first.argmax(2)).sum()
        row(name, f"{other}", f"{flips}", f"{np.abs(found.astype(np.float32) - first.astype(np.float32)).max():.3g}")


# students


def settings_of(lab: Lab, name: str) -> Student:
    return Student(
        model=f"deit_{name}_distilled_patch16_224", kwargs=lab.kwargs, batch_size=lab.views, compile=lab.compile
    )


def material_of(lab: Lab, name: str, size: int, part: str) -> Material:
    recipe = lab.recipe.model_copy(update={"size": size})
    root = lab.root / f"{part}-{name}-{size}"
    return make_material(root, lab.index, recipe, lab.groups, STEPS, lab.renderers, lab.pin)


def prepared(
    lab: Lab, material: Material, settings: Student, teacher: Callable, feeds: dict[str, Callable]
) -> tuple[dict[str, Stepping], float]:
    """The steps of a way by where its groups lie, warmed up; and its MiB."""
    before = allocated(lab.device)
    trainer = make_trainer(material, settings, teacher, lab.device)
    works = {feed: Stepping(trainer, batches()) for feed, batches in feeds.items()}
    for work in works.values():
        timed(work, 2, lab.device)  # compiles, and makes AdamW's state
    allocated(lab.device, peak=True)
    timed(works["host"], 2, lab.device)
    return works, allocated(lab.device, peak=True) - before


def step_part(lab: Lab, name: str, size: int) -> None:
    """A student at a size: its three ways in turns."""
    material, settings = material_of(lab, name, size, "steps"), settings_of(lab, name)
    steps = [batch.to(lab.device) for batch in material.steps]
    feeds = {
        "host": lambda: on_device(itertools.cycle(material.steps), lab.device),
        "device": lambda: itertools.cycle(steps),
    }
    clocked = Clocked(StoredTeacher(material.store, "argmax"))
    ways = {
        "without": (settings.model_copy(update={"distillation": "none"}), NoTeacher()),
        "stored": (settings, clocked),
        "online": (settings, OnlineTeacher(TeacherForward(lab.teacher, lab.answering))),
    }
    works, memory, failed = {}, {}, {}
    for way, (student, answering) in ways.items():
        try:
            made, memory[way] = prepared(lab, material, student, answering, feeds)
            works |= {(way, feed): work for feed, work in made.items()}
        except Exception as error:  # out of memory, most likely: the others may have room
            traceback.print_exc()
            failed[way] = reason(error)
            gc.collect()
    memory["online"] = memory.get("online", 0.0) + weights_mib(lab.teacher)
    forward = forward_of(lab, [steps[0]])
    timed(forward, 2, lab.device)
    clocked.seconds.clear()
    for work in works.values():
        work.begin()
    found = in_turns(works | {"forward": forward}, lab.rounds, lab.seconds, lab.device)
    flops = flop_bound(lab.teacher, build_student(settings, material.plan.recipe, CLASSES, size), size)
    print_steps(lab, found, works, memory, failed, flops)
    if clocked.seconds:
        print(f"\n`StoredTeacher` in place, us of the host a step: {spread([1e6 * s for s in clocked.seconds])}")
    print_bounds(found, flops[0])


def weights_mib(model: torch.nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers())) / 2**20


def print_steps(lab: Lab, found: dict, works: dict, memory: dict, failed: dict, flops: tuple) -> None:
    _, of_teacher, of_student = flops
    ways = {
        "without": ("step without distillation", 3 * of_student),
        "stored": ("step with the store", 3 * of_student),
        "online": ("step, teacher online", 3 * of_student + of_teacher),
    }
    head(
        f"{lab.views} views a step", "groups on the host, ms", "on the device, ms", "views/s", "TFLOP/s", "waits, %",
        "host, ms", "MiB at most",
    )  # fmt: skip
    for way, (title, multiply_adds) in ways.items():
        if way in failed:
            row(title, f"**failed**: {failed[way]}", *[""] * 6)
            continue
        milliseconds = [spread([1e3 * second for second in found[way, feed]]) for feed in ("host", "device")]
        work = works[way, "device"]
        waits, host = f"{100 * work.waited / work.seconds:.0f}", f"{1e3 * work.host:.3g}"
        row(title, *milliseconds, *rates(lab, found[way, "device"], multiply_adds), waits, host, f"{memory[way]:.0f}")
    milliseconds = spread([1e3 * second for second in found["forward"]])
    row("the teacher's forward alone", "", milliseconds, *rates(lab, found["forward"], of_teacher), "", "", "")


def rates(lab: Lab, seconds: list[float], multiply_adds: int) -> tuple[str, str]:
    """Views and TFLOP a second."""
    views = lab.views / statistics.median(seconds)
    return f"{views:,.0f}", f"{2e-12 * multiply_adds * views:.3g}"


def print_bounds(found: dict, flops: float) -> None:
    """The ratios of the ways, and how near the bound the store comes."""
    shown, bound = {}, "bound: 1 + forward / without"
    for over, under in (("stored", "without"), ("online", "stored")):
        for feed in ("host", "device"):
            if (over, feed) in found and (under, feed) in found:
                shown[f"{over} / {under}, groups on the {feed}"] = ratios(found[over, feed], found[under, feed])
    if ("without", "device") in found:
        shown[bound] = [1 + ratio for ratio in ratios(found["forward"], found["without", "device"])]
    reached = shown.get("online / stored, groups on the device")
    if reached and bound in shown:
        shown["online / stored, of that bound"] = ratios(reached, shown[bound])
    print()
    head("ratio", "median (least to greatest)")
    for name, values in shown.items():
        row(name, spread(values))
    row("FLOP bound: 1 + T / (3 S)", f"{flops:.4g}")
    sides = {"stored / without": ("at most", 1.02), "online / stored, of": ("at least", 0.95)}
    print_goals(
        [
            (name, *side, statistics.median(values))
            for name, values in shown.items()
            for start, side in sides.items()
            if name.startswith(start)
        ]
    )


def loader_part(lab: Lab, name: str, size: int) -> None:
    """The step with the store from the real loader, which renders the same few steps again and again."""
    material, settings = material_of(lab, name, size, "loader"), settings_of(lab, name)
    trainer = make_trainer(material, settings, StoredTeacher(material.store, "argmax"), lab.device)
    endless = [number % STEPS for number in range(100_000)]
    batches = step_loader(material.plan, lab.index, endless, range(1), 1, lab.workers, lab.pin)
    step = Stepping(trainer, on_device(batches, lab.device))
    timed(step, 2, lab.device)  # compiles
    once = timed(step, 3 * lab.workers, lab.device)  # and more than was rendered meanwhile
    trainer.epoch_speed.snapshot()
    found = timed(step, max(4 * lab.workers, round(3 * lab.rounds * lab.seconds / once)), lab.device)
    told = trainer.epoch_speed.snapshot()
    head(f"{settings.model}, {size} px, {lab.workers} workers", "found")
    row("step with the store, ms", f"{1e3 * found:.4g}")
    row("views/s", f"{lab.views / found:,.0f}")
    row("views a decoding", f"{told['views_per_decode']:.3g}")
    row("of the time, waiting for the loader, %", f"{100 * told['wait_s'] / told['seconds']:.3g}")


PARTS = {"teacher": teacher_part, "bits": bits_part, "repeats": repeats_part}


def parts_of(lab: Lab, cases: str) -> dict[str, Callable[[], None]]:
    """Every part by its name, in order."""
    named = {case: (case.split("@")[0], int(case.split("@")[1])) for case in cases.split(",")}
    fed = next((case for case in named.values() if case[0] == "small"), next(iter(named.values())))
    steps = {case: partial(step_part, lab, *of) for case, of in named.items()}
    teacher = {name: partial(part, lab) for name, part in PARTS.items()}
    return teacher | {"loader": partial(loader_part, lab, *fed)} | steps


@click.command(help=__doc__)
@click.option("--only", help="Parts, by their names: teacher, bits, repeats, loader, the cases.")
@click.option("--cases", default="tiny@224,small@224,base@224,base@384", show_default=True)
@click.option("--teacher", default="regnety_160", show_default=True)
@click.option("--batch", default=256, show_default=True, help="Views of a step.")
@click.option("--group", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Of each way, all rounds together.")
@click.option("--minutes", default=5.0, show_default=True, help="After these no part begins.")
@click.option("--workers", default=0, show_default=True, help="0: one less than the cores.")
@click.option("--compile/--no-compile", default=None, help="Compiled on a GPU unless told otherwise.")
@DEVICE
@click.option("--tiny", is_flag=True, help="Small models and pictures, two rounds: to see that it runs.")
def main(**options):
    given = SimpleNamespace(**options)
    device = find_device(given.device)
    if given.compile is None:
        given.compile = device.type == "cuda"
    if given.tiny:
        given.rounds, given.cases = 2, "tiny@32,small@48"
    deadline = time.monotonic() + 60 * given.minutes
    print(conditions())
    how = "compiled" if given.compile else "not compiled"
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").exists() else 0
    print(f"* {device}, {how}, {shared:.0f} GiB of shared memory free", flush=True)
    with tempfile.TemporaryDirectory() as root:
        parts = parts_of(make_lab(Path(root), device, given), given.cases)
        chosen = given.only.split(",") if given.only else list(parts)
        if unknown := set(chosen) - set(parts):
            raise click.UsageError(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        for title in chosen:
            attempt(title, parts[title], deadline)


if __name__ == "__main__":
    main()
