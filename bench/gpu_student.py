"""The parts of bench/gpu.py about training steps: their time, the real loader, and whether weights repeat."""

import itertools
import statistics

import torch
from experiment import Material
from lab import CLASSES, STEPS, Lab
from results import head, print_goals, ratios, row, spread
from steps import Clocked, Stepping, flop_bound, in_turns, make_trainer, timed, ways

from pipeline.batches.loader import step_loader
from pipeline.batches.transfer import on_device
from pipeline.common.arithmetic import deterministic_kernels
from pipeline.config.schema import Student, Teacher
from pipeline.models.build import build_student
from pipeline.models.teacher import TeacherForward
from pipeline.training.run import NoTeacher
from pipeline.training.teachers import StoredTeacher

REPEATED = 12
FEEDS = ("host", "device")
Found = dict[tuple[str, str], list[float]]
"""Seconds by way and by where the batches are."""


def step_part(lab: Lab, name: str, size: int) -> None:
    """Three ways to train a student, in turns."""
    material, settings = lab.material(f"steps-{name}-{size}", size, lab.groups), lab.student(name)
    on_gpu = [batch.to(lab.device) for batch in material.steps]
    works, memory = {}, {}
    chosen = ways(material, settings, TeacherForward(lab.teacher, lab.teacher_logits))
    for way, (student, teacher) in chosen.items():
        before = lab.allocated()
        trainer = make_trainer(material, student, teacher, lab.device)
        works[way, "host"] = Stepping(trainer, on_device(itertools.cycle(material.steps), lab.device))
        works[way, "device"] = Stepping(trainer, itertools.cycle(on_gpu))
        for feed in FEEDS:
            timed(works[way, feed], 2, lab.device)  # compiles, and makes AdamW's state
        lab.allocated(peak=True)
        timed(works[way, "host"], 2, lab.device)
        memory[way] = lab.allocated(peak=True) - before
    tensors = itertools.chain(lab.teacher.parameters(), lab.teacher.buffers())
    memory["online"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
    forward = lab.forward([on_gpu[0]])
    timed(forward, 2, lab.device)
    clocked = chosen["stored"][1]
    assert isinstance(clocked, Clocked)
    clocked.seconds.clear()
    for work in works.values():
        work.reset()
    found = in_turns(works | {("forward", "device"): forward}, lab.rounds, lab.seconds, lab.device)
    flops = flop_bound(lab.teacher, build_student(settings, material.plan.recipe, CLASSES, size), size)
    print_steps(lab, found, works, memory, flops)
    print(f"\n`StoredTeacher` in place, us of the host per step: {spread([1e6 * s for s in clocked.seconds])}\n")
    print_bounds(found, flops[0])


def print_steps(lab: Lab, found: Found, works: dict[tuple[str, str], Stepping], memory: dict, flops: tuple) -> None:
    _, of_teacher, of_student = flops
    titles = {
        "without": ("step without distillation", 3 * of_student),
        "stored": ("step with the store", 3 * of_student),
        "online": ("step with the teacher online", 3 * of_student + of_teacher),
    }
    columns = ("batches on the host, ms", "on the device, ms", "views/s", "TFLOP/s", "waits, %", "host, ms", "MiB")
    head(f"{lab.views} views per step", *columns)
    for way, (title, multiply_adds) in titles.items():
        milliseconds = [spread([1e3 * second for second in found[way, feed]]) for feed in FEEDS]
        work = works[way, "device"]
        waits, host = f"{100 * work.waited / work.seconds:.0f}", f"{1e3 * work.host:.3g}"
        row(title, *milliseconds, *rates(lab, found[way, "device"], multiply_adds), waits, host, f"{memory[way]:.0f}")
    alone = found["forward", "device"]
    row("the teacher's forward alone", "", spread([1e3 * s for s in alone]), *rates(lab, alone, of_teacher), "", "", "")


def rates(lab: Lab, seconds: list[float], multiply_adds: int) -> tuple[str, str]:
    """Views and TFLOP per second."""
    views = lab.views / statistics.median(seconds)
    return f"{views:,.0f}", f"{2e-12 * multiply_adds * views:.3g}"


def print_bounds(found: Found, flops: float) -> None:
    """The ratios of the ways, and how close the store comes to the bound."""
    shown = {
        f"{over} / {under}, batches on the {feed}": ratios(found[over, feed], found[under, feed])
        for over, under in (("stored", "without"), ("online", "stored"))
        for feed in FEEDS
    }
    bound = [1 + ratio for ratio in ratios(found["forward", "device"], found["without", "device"])]
    shown["bound: 1 + forward / without"] = bound
    shown["online / stored, of that bound"] = ratios(shown["online / stored, batches on the device"], bound)
    head("ratio", "median (minimum to maximum)")
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
    """The step with the store, fed by the real loader, which renders the same few steps again and again."""
    material, settings = lab.material(f"loader-{name}-{size}", size, lab.groups), lab.student(name)
    trainer = make_trainer(material, settings, StoredTeacher(material.store, "argmax"), lab.device)
    endless = [number % STEPS for number in range(100_000)]
    batches = step_loader(material.plan, lab.index, endless, range(1), 1, lab.workers, lab.pin)
    step = Stepping(trainer, on_device(batches, lab.device))
    timed(step, 2, lab.device)  # compiles
    once = timed(step, 3 * lab.workers, lab.device)  # and uses up what was rendered meanwhile
    trainer.meters.epoch.snapshot()
    found = timed(step, max(4 * lab.workers, round(3 * lab.rounds * lab.seconds / once)), lab.device)
    speed = trainer.meters.epoch.snapshot()
    head(f"{settings.model}, {size} px, {lab.workers} workers", "measured")
    row("step with the store, ms", f"{1e3 * found:.4g}")
    row("views/s", f"{lab.views / found:,.0f}")
    row("views per decode", f"{speed['views_per_decode']:.3g}")
    row("time spent waiting for the loader, %", f"{100 * speed['wait_s'] / speed['seconds']:.3g}")


def repeats_part(lab: Lab) -> None:
    """Train a student with the store, and a teacher of one group per step (not compiled), twice each; compare bits."""
    head(f"{REPEATED} steps, twice", "deterministic", "weights", "that differ", "largest difference", "ms per step")
    size = lab.recipe.size
    teacher = Teacher(model=lab.teacher_model, batch_size=lab.recipe.group_size)
    cases = (("student", lab.student("small"), lab.groups), ("teacher", teacher, 1))
    for name, settings, groups in cases:
        material = lab.material(f"repeats-{name}", size, groups, steps=3)
        for deterministic in (False, True):
            (first, _), (second, seconds) = (trained(lab, material, settings, deterministic) for _ in range(2))
            other = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
            largest = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
            count = sum(tensor.numel() for tensor in first)
            row(f"{name}: {settings.model}", "yes" if deterministic else "no", f"{count:,}", f"{other:,}",
                f"{largest:.3g}", f"{1e3 * seconds:.4g}")  # fmt: skip


def trained(
    lab: Lab, material: Material, settings: Student | Teacher, deterministic: bool
) -> tuple[list[torch.Tensor], float]:
    """All weights on the CPU after REPEATED steps from the same fresh ones, and seconds per step in the second half."""
    teacher = StoredTeacher(material.store, "argmax") if isinstance(settings, Student) else NoTeacher()
    with deterministic_kernels(deterministic):
        trainer = make_trainer(material, settings, teacher, lab.device)
        step = Stepping(trainer, itertools.cycle([batch.to(lab.device) for batch in material.steps]))
        timed(step, REPEATED // 2, lab.device)
        seconds = timed(step, REPEATED - REPEATED // 2, lab.device)
    return [tensor.float().cpu() for tensor in trainer.run.model.state_dict().values()], seconds
