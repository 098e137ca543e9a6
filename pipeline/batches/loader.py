"""Loaders of rendered batches, for training steps, units and evaluation.

Workers only render; the training process attaches the teacher's predictions and compares checksums.
"""

import dataclasses
import gc
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline.batches.batch import Batch, Renderer
from pipeline.batches.buffers import BufferPool, BufferRef
from pipeline.batches.plan import Plan, Unit, unit_items
from pipeline.common.cores import resolve_workers
from pipeline.common.signals import ignore_job_signals
from pipeline.config.schema import Recipe
from pipeline.shards.index import Index
from pipeline.views.render import center_view


class _StepDataset(Dataset):
    """Maps (step, slice, buffer or None) to that slice of the step, rendered."""

    def __init__(self, plan: Plan, index: Index, slices: int, pool: BufferPool):
        self.plan, self.slices, self.pool = plan, slices, pool
        self.renderer = Renderer(index, plan.recipe)

    def __getitem__(self, task: tuple[int, int, int | None]) -> Batch:
        step, number, buffer = task
        items = self.plan.items(step, number, self.slices)
        if buffer is None:
            return self.renderer.render(items)
        batch = self.renderer.render(items, self.pool.buffers[buffer])
        return dataclasses.replace(batch, images=BufferRef(self.pool.id, buffer))


class _StepSampler:
    """(step, slice) with a buffer for it, acquired when the loader sends the task to a worker."""

    def __init__(self, slices: list[tuple[int, int]], pool: BufferPool):
        self.slices, self.pool = slices, pool

    def __iter__(self) -> Iterator[tuple[int, int, int | None]]:
        return ((*task, self.pool.acquire()) for task in self.slices)


class _UnitDataset(IterableDataset):
    """The items of units, one per batch; worker w of n renders every n-th group, so each image is decoded once."""

    def __init__(self, units: list[Unit], index: Index, recipe: Recipe):
        self.units, self.renderer = units, Renderer(index, recipe)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        block, count = self.renderer.recipe.block, 0
        for unit in self.units:
            items = unit_items(unit, self.renderer.recipe, self.renderer.samples[unit.shard])
            for first in range(0, len(items), block):
                if count % workers == worker:
                    for item in items[first : first + block]:
                        yield self.renderer.render([item])
                count += 1


def step_loader(
    plan: Plan, index: Index, steps: Iterable[int], own: range, slices: int, workers: int | None, pin: bool
) -> Iterable[Batch]:
    """Batches of each step in turn: its slices `own` (one per accumulation step of this rank) out of `slices`."""
    tasks = [(step, number) for step in steps for number in own]
    size, slots = plan.recipe.size, plan.recipe.group_size
    # two per worker; without the copy to pinned memory, one that arrives and one that is still being read
    workers = resolve_workers(workers, pin)
    count = min(2 * workers + (0 if pin else 2), len(tasks)) if workers else 0
    pool = BufferPool(count, (plan.batch_groups // slices, slots, 3, size, size))
    return _loader(_StepDataset(plan, index, slices, pool), workers, pin, sampler=_StepSampler(tasks, pool))


def unit_loader(units: list[Unit], index: Index, recipe: Recipe, workers: int | None, pin: bool) -> Iterable[Batch]:
    """A batch per item of the units; several workers interleave groups."""
    return _loader(_UnitDataset(units, index, recipe), workers, pin)


class ImageSet(Protocol):
    """Images by row; an `Index` is one."""

    classes: list[str]

    def __len__(self) -> int: ...

    def locate(self, row: int) -> tuple[int, int]: ...

    def image(self, shard: int, position: int) -> np.ndarray: ...


class _EvaluationDataset(Dataset):
    def __init__(self, index: ImageSet, rows: range, size: int, crop: float):
        self.index, self.rows, self.size, self.crop = index, rows, size, crop

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> torch.Tensor:
        image = self.index.image(*self.index.locate(self.rows[position]))
        return torch.from_numpy(center_view(image, self.size, self.crop))


def evaluation_loader(
    index: ImageSet, rows: range, size: int, crop: float, batch: int, workers: int | None, pin: bool
) -> Iterable[torch.Tensor]:
    """The samples `rows` in index order, as uint8 (batch, 3, size, size)."""
    return _loader(_EvaluationDataset(index, rows, size, crop), workers, pin, batch_size=batch)


def _loader(
    dataset: Dataset, workers: int | None, pin: bool, batch_size: int | None = None, sampler: Iterable | None = None
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=resolve_workers(workers, pin),
        pin_memory=pin,
        worker_init_fn=_start_worker,
        # its own generator: a loader that drew from the global one would shift it on resuming
        generator=torch.Generator().manual_seed(0),
    )


def _start_worker(_: int) -> None:
    # a forked worker must not collect what it inherited: finalizing a connection would close the parent's too
    gc.freeze()
    torch.set_num_threads(1)
    ignore_job_signals()
