"""What the benchmarks of whole steps share: a made-up data set, a store about it, trainers, works in turns.

Nothing is read from outside. Photographs are noise of several scales; labels, answers and weights are random.
Real are the shards and their index, the rendering, the groups' checks, which the store holds and training
compares, and the step itself, which is pipeline.training.trainer.Trainer's.
"""


import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs where the project is not installed

import cv2
import numpy as np
import torch

from pipeline.batches.batch import Batch
from pipeline.batches.loader import step_loader
from pipeline.batches.plan import Plan
from pipeline.batches.transfer import DeviceToHostCopy
from pipeline.config.schema import Recipe, Student
from pipeline.models.build import NormalizedModel, build_student
from pipeline.shards.index import Index
from pipeline.shards.indexing import index_shard, write_index, write_shard
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.writer import StoreWriter
from pipeline.training.run import Run
from pipeline.training.teachers import read_predictions
from pipeline.training.trainer import Trainer
from pipeline.views.draw import group_count

# instead of a model's own, with --tiny: seconds on one core
TINY_STUDENT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_TEACHER = "regnety_002"


def photographs(count: int, width: int = 500, height: int = 375) -> list[bytes]:
    """JPEGs of seeded noise at several scales; about 110 kB at this size, as ImageNet's."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        picture = np.full((height, width, 3), 128, np.float32)
        for cell, strength in ((2, 28), (8, 16), (32, 25), (128, 40)):
            noise = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
            picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        _, data = cv2.imencode(".jpg", picture.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
        found.append(data.tobytes())
    return found


def make_index(root: Path, images: list[bytes], samples: list[int], classes: int) -> Index:
    """An index over a shard for each of `samples`, its number of samples; images stand several times."""
    root.mkdir(parents=True)
    labels, indexed = np.random.default_rng(1), []
    for shard, count in enumerate(samples):
        path = root / f"{shard:04d}.tar"
        write_shard(
            path,
            ((f"n{shard:03d}{n:06d}", "jpg", images[n % len(images)], labels.integers(classes)) for n in range(count)),
        )
        indexed.append(index_shard(str(root), path.name))
    write_index(root / "index.json", str(root), [f"n{label:08d}" for label in range(classes)], indexed)
    return Index(root / "index.json")


@dataclass
class Material:
    """The first steps of a plan, rendered, and a store that holds answers about them."""

    root: Path
    index: Index
    plan: Plan
    steps: list[Batch]
    store: Store


def make_material(
    root: Path, index: Index, recipe: Recipe, groups: int, steps: int, workers: int, pin: bool
) -> Material:
    """`steps` steps of `groups` groups each, out of the first `recipe.block` views."""
    plan = Plan(recipe, tuple(index.names), tuple(map(int, index.samples)), recipe.block, groups)
    rendered = list(step_loader(plan, index, range(steps), range(1), 1, workers, pin))
    return Material(root, index, plan, rendered, filled_store(root / "store.zarr", index, recipe, rendered))


def filled_store(path: Path, index: Index, recipe: Recipe, steps: list[Batch]) -> Store:
    """Random answers about the first block. Checks are those of the rendered groups; of others, random too.

    It keeps one chunk at hand, so a change of shard reads and compares one anew: more often than training does.
    """
    identity = StoreIdentity(index.fingerprint, recipe, {"model": "none"})
    store = StoreWriter.create(str(path), identity, index, recipe.block, "argmax", 1, "float32")
    known = [pair for batch in steps for pair in zip(batch.items, batch.checks, strict=True)]
    rng = np.random.default_rng(2)
    for unit in store.units(recipe.block):
        samples = int(index.samples[unit.shard])
        argmax = rng.integers(0, store.classes, (recipe.block, samples), np.uint16)
        checks = rng.integers(0, 2**63, (recipe.block, group_count(samples, recipe.group_size)), np.uint64)
        for item, check in known:
            if item.shard == unit.shard:
                checks[item.view, item.group] = check
        store.write_unit(unit, {"argmax": argmax}, checks)
    store.keep = 1
    return store


@dataclass
class Clocked:
    """Asks a teacher, and notes the seconds of this process that each answer takes."""

    teacher: Callable
    seconds: list[float] = field(default_factory=list)

    def __call__(self, batch: Batch, pictures: torch.Tensor):
        start = time.perf_counter()
        answer = self.teacher(batch, pictures)
        self.seconds.append(time.perf_counter() - start)
        return answer


def make_trainer(material: Material, settings: Student, teacher: Callable, device: torch.device) -> Trainer:
    """Of a student with fresh weights."""
    recipe, index = material.plan.recipe, material.index
    model = build_student(settings, recipe, len(index.classes), recipe.size)
    folder = material.root / f"{settings.model}-{type(teacher).__name__}"
    run = Run(
        folder.name, folder, {}, settings, material.plan, index, index, model, recipe.size, 1.0,
        teacher=teacher, distillation=settings, device=device,
    )  # fmt: skip
    return Trainer(run)


@dataclass
class Stepping:
    """Steps as Trainer.train does them, but for its log and checkpoints. What batches hold weighs the same."""

    trainer: Trainer
    batches: Iterator[Batch]
    seconds: float = 0.0
    """Of this process, in all steps."""
    waited: float = 0.0
    """Of these, for the values of the step before, which the device still computed."""
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

    def begin(self) -> None:
        """Count anew."""
        self.seconds, self.waited, self.steps = 0.0, 0.0, 0

    @property
    def host(self) -> float:
        """Seconds of this process a step, waiting left out; more than its work where the device's queue is full."""
        return (self.seconds - self.waited) / self.steps


def reading(material: Material, times: int = 20) -> float:
    """Seconds of read_predictions, a step: reading and comparing alone, the mean over all steps."""
    steps = itertools.islice(itertools.cycle(material.steps), times * len(material.steps))
    start = time.perf_counter()
    for batch in steps:
        read_predictions(material.store, batch, "argmax")
    return (time.perf_counter() - start) / (times * len(material.steps))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has nothing more to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one of `times` in a row, the device being idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / times


def in_turns(works: dict, rounds: int, seconds: float, device: torch.device) -> dict[object, list[float]]:
    """Seconds of each work in each round. Works take turns and change places.

    Each is done as often in a round as fits into `seconds`, at least once; it was warmed up before.
    """
    names, found = list(works), {name: [] for name in works}
    times = {name: max(1, math.ceil(seconds / timed(works[name], 1, device))) if seconds else 1 for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(timed(works[name], times[name], device))
    return found


def flop_bound(teacher: NormalizedModel, student: NormalizedModel, size: int) -> tuple[float, int, int]:
    """1 + T / (3 S), T and S being multiply-adds of a forward, a step taking three; and T and S."""
    from pipeline.models.evaluation import multiply_adds

    of_teacher, of_student = multiply_adds(teacher, size), multiply_adds(student, size)
    return 1 + of_teacher / (3 * of_student), of_teacher, of_student


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def print_goals(rows: list[tuple[str, str, float, float]]) -> None:
    """Rows: what, `at least` or `at most`, the bound, what was found."""
    print("\n| goal | | found | |\n| --- | ---: | ---: | --- |")
    for what, side, bound, found in rows:
        met = found >= bound if side == "at least" else found <= bound
        print(f"| {what} | {side} {bound:g} | {found:.4g} | {'met' if met else '**not met**'} |", flush=True)
