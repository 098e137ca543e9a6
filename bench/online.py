"""A training step with the store, with the teacher in the loop, and without distillation, on a CPU.

DeiT-Ti and DeiT-S (distilled, hard, 1,000 classes) beside RegNetY-16GF at 224 px in float32, a group of 8
a step. The step is Trainer.train_step, fed with groups that were rendered before: drop-path, AdamW and the
EMA of the weights are in it, rendering is not. The ways take turns and change places; ratios are taken
within a round, and so is the bound: 1 + the teacher's forward / the step without distillation, each alone.
The FLOP bound is 1 + T / (3 S), T and S being multiply-adds of a forward. One way more is the step with the
store whose linear layers are torch's own again: what pipeline/models/linear.py gains.

What the store adds is told twice. The step with it less the step without distillation is small beside the
noise, and holds the loss of the second head too. `read_predictions` is reading and comparing alone: in a loop,
and in place, inside the steps with the store. The store keeps one chunk at hand and so reads more often
than training does. Files come from the page cache.

    python bench/online.py [--rounds 10] [--students tiny,small]
"""

import itertools
import statistics
import tempfile
from pathlib import Path

import click
import torch
from experiment import (
    TINY_STUDENT,
    TINY_TEACHER,
    Clocked,
    Material,
    Stepping,
    flop_bound,
    in_turns,
    make_index,
    make_material,
    make_trainer,
    photographs,
    print_goals,
    ratios,
    reading,
)
from machine import conditions, spread
from torch import nn

from pipeline.batches.batch import mixed
from pipeline.config.schema import Recipe, Student, Teacher, TeacherLogits
from pipeline.models.build import NormalizedModel, build_student, build_teacher
from pipeline.models.linear import OneDNNLinear
from pipeline.models.teacher import TeacherForward
from pipeline.training.run import NoTeacher
from pipeline.training.teachers import OnlineTeacher, StoredTeacher

CPU = torch.device("cpu")
GROUP, STEPS = 8, 12
ASKED = TeacherLogits(precision="float32", batch_groups=1)
AT_LEAST = {"tiny": 3.8, "small": 2.0}  # times, online / stored


def measure(material: Material, settings: Student, teacher: NormalizedModel, rounds: int) -> dict[str, list[float]]:
    """Seconds by round of each way, of the teacher's forward, and of read_predictions alone and in place."""
    clocked = Clocked(StoredTeacher(material.store, "argmax"))
    undistilled = settings.model_copy(update={"distillation": "none"})
    ways = {
        "without": (undistilled, NoTeacher()),
        "stored": (settings, clocked),
        "plain linear": (settings, StoredTeacher(material.store, "argmax")),
        "online": (settings, OnlineTeacher(TeacherForward(teacher, ASKED))),
    }
    works = {}
    for way, (student, answering) in ways.items():
        trainer = make_trainer(material, student, answering, CPU)
        works[way] = Stepping(trainer, itertools.cycle(material.steps))
        if way == "plain linear":
            for part in trainer.run.model.modules():
                if type(part) is OneDNNLinear:
                    part.__class__ = nn.Linear
    pictures = mixed(material.steps[0])
    works["forward"] = lambda: TeacherForward(teacher, ASKED).logits(pictures, GROUP)
    in_turns(works, 1, 0, CPU)  # warms up: AdamW makes its state
    clocked.seconds.clear()
    found = in_turns(works, rounds, 0, CPU)
    return found | {"in place": clocked.seconds, "alone": [reading(material) for _ in range(rounds)]}


def figures(found: dict[str, list[float]], flops: float) -> dict[str, str]:
    """The table's rows: name to a cell."""
    without, stored, online, forward = (found[name] for name in ("without", "stored", "online", "forward"))
    bound, reached = [1 + ratio for ratio in ratios(forward, without)], ratios(online, stored)
    added = [100 * (ratio - 1) for ratio in ratios(stored, without)]
    ms = {name: spread([1e3 * value for value in values]) for name, values in found.items()}
    us = {name: spread([1e6 * value for value in found[name]]) for name in ("alone", "in place")}
    return {
        "step without distillation, ms": ms["without"],
        "step with the store, ms": ms["stored"],
        "step with the store, torch's own linear layers, ms": ms["plain linear"],
        "step with the teacher online, ms": ms["online"],
        "the teacher's forward alone, ms": ms["forward"],
        "online / stored": spread(reached),
        "bound: 1 + forward / without": spread(bound),
        "online / stored, of that bound": spread(ratios(reached, bound)),
        "torch's own linear layers / ours": spread(ratios(found["plain linear"], stored)),
        "FLOP bound: 1 + T / (3 S)": f"{flops:.4g}",
        "stored less without, % of without (the second head's loss and noise are in it)": spread(added),
        "`read_predictions` alone, us a step": us["alone"],
        "`read_predictions` in place, us a step": us["in place"],
        "the mean of these, % of the step without": f"{added_by_store(found):.3g}",
    }


def added_by_store(found: dict[str, list[float]]) -> float:
    """Per cent of the step that read_predictions takes in place, on average."""
    return 100 * statistics.mean(found["in place"]) / statistics.median(found["without"])


def print_table(columns: dict[str, dict[str, str]]) -> None:
    print(f"\n| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")


@click.command(help=__doc__)
@click.option("--rounds", default=10, show_default=True)
@click.option("--students", default="tiny,small", show_default=True, help="DeiT's sizes: tiny, small, base.")
@click.option("--teacher", "teacher_name", default="regnety_160", show_default=True)
@click.option("--size", default=224, show_default=True)
@click.option("--tiny", is_flag=True, help="Small models and pictures, two rounds: to see that it runs.")
def main(rounds: int, students: str, teacher_name: str, size: int, tiny: bool):
    kwargs = {}
    if tiny:
        rounds, teacher_name, size, kwargs = 2, TINY_TEACHER, 32, TINY_STUDENT
    images = photographs(16, 64, 48) if tiny else photographs(200, 250, 188)
    recipe = Recipe(size=size, group_size=GROUP)
    teacher = build_teacher(Teacher(model=teacher_name), 1000).eval()
    print(conditions())
    print(f"* {torch.get_num_threads()} threads; {teacher_name}, {size} px, {GROUP} views a step, {rounds} rounds")
    columns, goals = {}, []
    with tempfile.TemporaryDirectory() as root:
        index = make_index(Path(root) / "shards", images, [24, 24] if tiny else [1256, 1256], 1000)
        material = make_material(Path(root), index, recipe, 1, STEPS, 0, False)
        for name in students.split(","):
            settings = Student(
                model=f"deit_{name}_distilled_patch16_224", kwargs=kwargs, batch_size=GROUP, precision="float32"
            )
            found = measure(material, settings, teacher, rounds)
            student = build_student(settings, recipe, 1000, size)
            columns[name] = figures(found, flop_bound(teacher, student, size)[0])
            if name in AT_LEAST:
                reached = statistics.median(ratios(found["online"], found["stored"]))
                goals.append((f"{name}: online / stored", "at least", AT_LEAST[name], reached))
            goals.append((f"{name}: `read_predictions`, % of the step", "at most", 1.0, added_by_store(found)))
    print_table(columns)
    print_goals(goals)


if __name__ == "__main__":
    main()
