"""What the parts of bench/gpu.py are told, and how they tell what they found."""

import contextlib
import gc
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from experiment import TINY_STUDENT, TINY_TEACHER, make_index, photographs, synchronize

from pipeline.config.schema import Recipe, Teacher, TeacherLogits
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.shards.index import Index

BLOCK = 24  # not 30: then a unit of one group a worker comes out in whole batches
CLASSES = 1000


@dataclass(frozen=True)
class Lab:
    """Models, data and options."""

    root: Path
    device: torch.device
    index: Index
    """Three shards: of as many groups as there are workers, the same, and of four groups."""
    recipe: Recipe
    teacher_model: str
    teacher: NormalizedModel
    answering: TeacherLogits
    """How the teacher is asked: bfloat16, channels_last, compiled with --compile."""
    groups: int
    """Of a step, and of a forward of the teacher."""
    kwargs: dict
    """Of students."""
    compile: bool
    workers: int
    rounds: int
    seconds: float
    """Of a work in a round."""

    @property
    def pin(self) -> bool:
        return self.device.type == "cuda"

    @property
    def views(self) -> int:
        """Of a step."""
        return self.groups * self.recipe.group_size

    @property
    def renderers(self) -> int:
        """Workers that render what is measured later; without a GPU none, so that nothing stays in shared memory."""
        return self.workers if self.pin else 0


def make_lab(root: Path, device: torch.device, given) -> Lab:
    """From the options of bench/gpu.py."""
    size, group, batch = (32, 4, 8) if given.tiny else (224, given.group, given.batch)
    workers = given.workers or max(1, (os.cpu_count() or 2) - 1)
    samples = [group * max(workers, 4), group * max(workers, 4), group * 4]
    index = make_index(root / "shards", photographs(16, 64, 48) if given.tiny else photographs(200), samples, CLASSES)
    name = TINY_TEACHER if given.tiny else given.teacher
    teacher = build_teacher(Teacher(model=name), CLASSES).to(device).eval()
    if given.compile:
        import torch._dynamo.config as dynamo

        # a shape is constant in training; here several models of several sizes share one NormalizedModel.forward
        dynamo.automatic_dynamic_shapes, dynamo.recompile_limit = False, 64
    answering = TeacherLogits(
        views=BLOCK, top_k=1, precision="bfloat16", batch_groups=batch // group, channels_last=True,
        compile=given.compile,
    )  # fmt: skip
    return Lab(
        root=root,
        device=device,
        index=index,
        recipe=Recipe(size=size, group_size=group, block=BLOCK),
        teacher_model=name,
        teacher=teacher,
        answering=answering,
        groups=batch // group,
        kwargs=TINY_STUDENT if given.tiny else {},
        compile=given.compile,
        workers=workers,
        rounds=given.rounds,
        seconds=0.0 if given.tiny else given.seconds / given.rounds,
    )


def allocated(device: torch.device, peak: bool = False) -> float:
    """MiB of a GPU allocated now, or with `peak` at most since this was called last."""
    if device.type != "cuda":
        return 0.0
    synchronize(device)
    found = torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found / 2**20


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def head(*cells: str) -> None:
    """A table's first two lines."""
    row(*cells)
    row("---", *["---:"] * (len(cells) - 1))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def attempt(title: str, part: Callable[[], None], deadline: float) -> None:
    """A part under its heading; what stops it is told there, and the next one goes on."""
    print(f"\n## {title}\n", flush=True)
    if time.monotonic() > deadline:
        print("left out: the time is over (--minutes)", flush=True)
        return
    start = time.monotonic()
    try:
        part()
    except Exception as error:  # out of memory, a compiler's: the other parts are worth as much
        traceback.print_exc()
        print(f"\n**failed**: {reason(error)}")
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
    print(f"\n{time.monotonic() - start:.0f} s with warming up", flush=True)
