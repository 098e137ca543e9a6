"""A training step with the store, with the teacher in the loop, and without distillation, on a CPU.

DeiT-Ti and DeiT-S (distilled, hard, 1,000 classes) with RegNetY-16GF at 224 px in float32, 8 views per step. The step
is Trainer.train_step, fed with groups that were rendered before: drop-path, AdamW and the EMA of the weights are in
it, rendering is not. The ways take turns in changing order; ratios are taken within a round, and so is the bound:
1 + the teacher's forward / the step without distillation, each alone. The FLOP bound is 1 + T / (3 S), with T and S
the multiply-adds of a forward pass. One more way is the step with the store and torch's own linear layers: what
pipeline/models/linear.py gains.

`read_predictions`: what reading and comparing take inside the steps with the store. The store caches one chunk and so
reads more often than training does. Files come from the page cache.

    python bench/online.py [--rounds 10] [--students tiny,small]
"""

import itertools
import statistics
import tempfile
from pathlib import Path

import click
import torch
from experiment import TINY_STUDENT, TINY_TEACHER, Material, make_index, make_material, photographs
from machine import conditions
from results import head, print_goals, ratios, row, spread
from steps import Clocked, Stepping, flop_bound, in_turns, make_trainer, ways
from torch import nn

from pipeline.batches.batch import mixed
from pipeline.config.schema import Recipe, Student, Teacher, TeacherLogits
from pipeline.models.build import NormalizedModel, build_student, build_teacher
from pipeline.models.linear import OneDNNLinear
from pipeline.models.teacher import TeacherForward
from pipeline.training.teachers import StoredTeacher

CPU = torch.device("cpu")
GROUP, STEPS = 8, 12
AT_LEAST = {"tiny": 3.8, "small": 2.0}  # times, online / stored


def measure(material: Material, settings: Student, model: NormalizedModel, rounds: int) -> dict[str, list[float]]:
    """Seconds by round of each way and of the teacher's forward pass, and of read_predictions in each step."""
    teacher = TeacherForward(model, TeacherLogits(precision="float32", batch_groups=1))
    chosen = ways(material, settings, teacher)
    chosen["plain linear"] = settings, StoredTeacher(material.store, "argmax")
    works = {}
    for way, (student, asked) in chosen.items():
        trainer = make_trainer(material, student, asked, CPU)
        works[way] = Stepping(trainer, itertools.cycle(material.steps))
        if way == "plain linear":
            for part in trainer.run.model.modules():
                if isinstance(part, OneDNNLinear):
                    part.forward = lambda x, part=part: nn.Linear.forward(part, x)
    pictures = mixed(material.steps[0])
    works["forward"] = lambda: teacher.logits(pictures, GROUP)
    in_turns(works, 1, 0, CPU)  # warms up: AdamW makes its state
    clocked = chosen["stored"][1]
    assert isinstance(clocked, Clocked)
    clocked.seconds.clear()
    return in_turns(works, rounds, 0, CPU) | {"reading": clocked.seconds}


def figures(found: dict[str, list[float]], flops: float) -> dict[str, str]:
    """The table's rows: name to a cell."""
    bound = [1 + ratio for ratio in ratios(found["forward"], found["without"])]
    reached = ratios(found["online"], found["stored"])
    ms = {name: spread([1e3 * value for value in values]) for name, values in found.items()}
    return {
        "step without distillation, ms": ms["without"],
        "step with the store, ms": ms["stored"],
        "step with the store, torch's own linear layers, ms": ms["plain linear"],
        "step with the teacher online, ms": ms["online"],
        "the teacher's forward alone, ms": ms["forward"],
        "online / stored": spread(reached),
        "bound: 1 + forward / without": spread(bound),
        "online / stored, of that bound": spread(ratios(reached, bound)),
        "torch's own linear layers / ours": spread(ratios(found["plain linear"], found["stored"])),
        "FLOP bound: 1 + T / (3 S)": f"{flops:.4g}",
        "`read_predictions`, us per step": spread([1e6 * value for value in found["reading"]]),
        "`read_predictions`, mean, % of the step without": f"{reading_share(found):.3g}",
    }


def reading_share(found: dict[str, list[float]]) -> float:
    """The mean time of read_predictions in percent of the step without distillation."""
    return 100 * statistics.mean(found["reading"]) / statistics.median(found["without"])


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
    print(f"* {torch.get_num_threads()} threads; {teacher_name}, {size} px, {GROUP} views per step, {rounds} rounds\n")
    columns, goals = {}, []
    with tempfile.TemporaryDirectory() as root:
        index = make_index(Path(root) / "shards", images, [24, 24] if tiny else [1256, 1256], 1000)
        material = make_material(Path(root), index, recipe, 1, STEPS, 0, False)
        for name in students.split(","):
            model = f"deit_{name}_distilled_patch16_224"
            settings = Student(model=model, kwargs=kwargs, batch_size=GROUP, precision="float32")
            found = measure(material, settings, teacher, rounds)
            columns[name] = figures(found, flop_bound(teacher, build_student(settings, recipe, 1000, size), size)[0])
            if name in AT_LEAST:
                reached = statistics.median(ratios(found["online"], found["stored"]))
                goals.append((f"{name}: online / stored", "at least", AT_LEAST[name], reached))
            goals.append((f"{name}: `read_predictions`, % of the step", "at most", 1.0, reading_share(found)))
    head("", *columns)
    for title in next(iter(columns.values())):
        row(title, *(column[title] for column in columns.values()))
    print_goals(goals)


if __name__ == "__main__":
    main()
