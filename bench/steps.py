"""Training steps of pipeline.training.trainer.Trainer, timed in turns: what online.py and gpu.py share."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from experiment import Material
from results import rotated

from pipeline.batches.batch import Batch
from pipeline.batches.transfer import DeviceToHostCopy
from pipeline.config.schema import Student, Teacher
from pipeline.models.build import NormalizedModel, build_student, build_teacher
from pipeline.models.evaluation import multiply_adds
from pipeline.models.teacher import TeacherForward
from pipeline.training.run import NoTeacher, Run
from pipeline.training.teachers import OnlineTeacher, StoredTeacher
from pipeline.training.trainer import Trainer

Name = TypeVar("Name")


@dataclass
class Clocked:
    """Calls a teacher, and records how many seconds of this process each call takes."""

    teacher: Callable
    seconds: list[float] = field(default_factory=list)

    def __call__(self, batch: Batch, pictures: torch.Tensor) -> Any:
        start = time.perf_counter()
        output = self.teacher(batch, pictures)
        self.seconds.append(time.perf_counter() - start)
        return output


def ways(material: Material, settings: Student, teacher: TeacherForward) -> dict[str, tuple[Student, Callable]]:
    """Three ways to train a student: its settings, and its teacher. The stored one is Clocked."""
    return {
        "without": (settings.model_copy(update={"distillation": "none"}), NoTeacher()),
        "stored": (settings, Clocked(StoredTeacher(material.store, "argmax"))),
        "online": (settings, OnlineTeacher(teacher)),
    }


def make_trainer(
    material: Material, settings: Student | Teacher, teacher: Callable, device: torch.device
) -> Trainer:
    """A trainer of a model with fresh weights."""
    recipe, index, distilled = material.plan.recipe, material.index, None
    if isinstance(settings, Student):
        model, distilled = build_student(settings, recipe, len(index.classes), recipe.size), settings
    else:
        model = build_teacher(settings, len(index.classes))
    folder = material.root / f"{settings.model}-{type(teacher).__name__}"
    return Trainer(Run(
        folder.name, folder, {}, settings, material.plan, index, index, model, recipe.size, 1.0,
        teacher=teacher, distillation=distilled, device=device,
    ))  # fmt: skip


@dataclass
class Stepping:
    """Steps as Trainer.train does them, without its log and checkpoints."""

    trainer: Trainer
    batches: Iterator[Batch]
    seconds: float = 0.0
    """Time that this process spent in all steps."""
    waited: float = 0.0
    """Of these, waiting for the values of the previous step, which the device was still computing."""
    steps: int = 0
    arriving: DeviceToHostCopy | None = None

    def __call__(self) -> None:
        start = time.perf_counter()
        values = self.trainer.train_step(self.batches)
        issued = time.perf_counter()
        if self.arriving:
            self.arriving.get()
        self.waited += time.perf_counter() - issued
        self.arriving = DeviceToHostCopy(values)
        self.trainer.step += 1
        self.steps += 1
        self.seconds += time.perf_counter() - start

    def reset(self) -> None:
        """Count from zero."""
        self.seconds, self.waited, self.steps = 0.0, 0.0, 0

    @property
    def host(self) -> float:
        """Seconds of this process per step, without waiting; more than its work where the device's queue is full."""
        return (self.seconds - self.waited) / self.steps


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has nothing more to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Mean seconds of `times` calls in a row, the device being idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / times


def in_turns(
    works: dict[Name, Callable[[], Any]], rounds: int, seconds: float, device: torch.device
) -> dict[Name, list[float]]:
    """Seconds of each work in each round, in an order that changes from round to round.

    In each round a work is called as often as fits into `seconds`, at least once. All were warmed up before.
    """
    found: dict[Name, list[float]] = {name: [] for name in works}
    times = {
        name: max(1, math.ceil(seconds / timed(work, 1, device))) if seconds else 1 for name, work in works.items()
    }
    for turn in range(rounds):
        for name in rotated(list(works), turn):
            found[name].append(timed(works[name], times[name], device))
    return found


def flop_bound(teacher: NormalizedModel, student: NormalizedModel, size: int) -> tuple[float, int, int]:
    """1 + T / (3 S), with T and S the multiply-adds of a forward pass, a step counting as three; and T and S."""
    of_teacher, of_student = multiply_adds(teacher, size), multiply_adds(student, size)
    return 1 + of_teacher / (3 * of_student), of_teacher, of_student
