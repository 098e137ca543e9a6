"""What the parts of bench/gpu.py work on, and how they are run."""

import contextlib
import gc
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from experiment import TINY_STUDENT, TINY_TEACHER, Material, make_index, make_material, photographs
from steps import synchronize

from pipeline.batches.batch import Batch, mixed
from pipeline.config.schema import Recipe, Student, Teacher, TeacherLogits
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.models.teacher import TeacherForward
from pipeline.shards.index import Index

BLOCK = 24  # not 30: a unit with one group per worker then makes complete batches
CLASSES = 1000
STEPS = 7  # rendered; a prime number, so that a worker does not meet the same one again and again


@dataclass(frozen=True)
class Lab:
    """Models, data and options."""

    root: Path
    device: torch.device
    index: Index
    """Three shards: two with as many groups as there are workers, and one with four."""
    recipe: Recipe
    teacher: NormalizedModel
    teacher_model: str
    teacher_logits: TeacherLogits
    """bfloat16, channels_last, compiled with --compile."""
    groups: int
    """Groups per step, and per forward pass of the teacher."""
    student_kwargs: dict[str, Any]
    compile: bool
    workers: int
    rounds: int
    seconds: float
    """Time for a work in a round."""

    @property
    def pin(self) -> bool:
        return self.device.type == "cuda"

    @property
    def views(self) -> int:
        """Views per step."""
        return self.groups * self.recipe.group_size

    @property
    def renderers(self) -> int:
        """Workers that render what is measured later; none without a GPU, so that nothing stays in shared memory."""
        return self.workers if self.pin else 0

    def student(self, name: str) -> Student:
        model = f"deit_{name}_distilled_patch16_224"
        return Student(model=model, kwargs=self.student_kwargs, batch_size=self.views, compile=self.compile)

    def material(self, name: str, size: int, groups: int, steps: int = STEPS) -> Material:
        """Rendered steps of `groups` groups, in a folder of that name."""
        recipe = self.recipe.model_copy(update={"size": size})
        return make_material(self.root / name, self.index, recipe, groups, steps, self.renderers, self.pin)

    def forward(self, batches: list[Batch]) -> Callable[[], torch.Tensor]:
        """The teacher's bare forward pass over these pictures, which are on the device, in UnitWorker's memory format."""
        pictures = torch.cat([mixed(batch.to(self.device)) for batch in batches])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        forward = TeacherForward(self.teacher, self.teacher_logits)
        return lambda: forward.logits(pictures, self.recipe.group_size)

    def allocated(self, peak: bool = False) -> float:
        """MiB of a GPU allocated now or, with `peak`, the most since the previous call."""
        if self.device.type != "cuda":
            return 0.0
        synchronize(self.device)
        found = (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return found / 2**20


def make_lab(root: Path, device: torch.device, options: SimpleNamespace) -> Lab:
    """A lab from the options of bench/gpu.py."""
    tiny, compiled = options.tiny, options.compile
    size, group, batch = (32, 4, 8) if tiny else (224, options.group, options.batch)
    workers = options.workers or max(1, (os.cpu_count() or 2) - 1)
    samples = [group * max(workers, 4), group * max(workers, 4), group * 4]
    name = TINY_TEACHER if tiny else options.teacher
    if compiled:
        import torch._dynamo.config as dynamo

        # a shape is constant in training; here models of several sizes share one NormalizedModel.forward
        dynamo.automatic_dynamic_shapes, dynamo.recompile_limit = False, 64
    return Lab(
        root=root,
        device=device,
        index=make_index(root / "shards", photographs(16, 64, 48) if tiny else photographs(200), samples, CLASSES),
        recipe=Recipe(size=size, group_size=group, block=BLOCK),
        teacher=build_teacher(Teacher(model=name), CLASSES).to(device).eval(),
        teacher_model=name,
        teacher_logits=TeacherLogits(
            views=BLOCK, top_k=1, precision="bfloat16", batch_groups=batch // group, channels_last=True, compile=compiled
        ),
        groups=batch // group,
        student_kwargs=TINY_STUDENT if tiny else {},
        compile=compiled,
        workers=workers,
        rounds=options.rounds,
        seconds=0.0 if tiny else options.seconds / options.rounds,
    )


def attempt(title: str, part: Callable[[], None], deadline: float) -> None:
    """Run a part under its heading; an error is printed there, and the next part is run."""
    print(f"\n## {title}\n", flush=True)
    if time.monotonic() > deadline:
        print("left out: the time is over (--minutes)", flush=True)
        return
    start = time.monotonic()
    try:
        part()
    except Exception as error:  # out of memory, or the compiler's: the other parts are worth as much
        traceback.print_exc()
        print(f"\n**failed**: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}")
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
    print(f"\n{time.monotonic() - start:.0f} s with warming up", flush=True)
