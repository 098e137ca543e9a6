"""Items to rendered groups to device batches.

Workers only render; the process that trains attaches the answers and compares checksums.
"""

import dataclasses
import gc
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline.batches.batch import Batch, Renderer
from pipeline.batches.buffers import Pool, Rendered
from pipeline.batches.plan import Plan, Unit, unit_items
from pipeline.common.cores import resolve_workers
from pipeline.common.signals import ignore_job_signals
from pipeline.config.schema import Recipe
from pipeline.shards.index import Index
from pipeline.views.render import center_view


class _Steps(Dataset):
    """Map from (step, part, buffer or None) to that slice of the step, rendered."""

    def __init__(self, plan: Plan, index: Index, parts: int, pool: Pool):
        self.plan, self.parts, self.pool = plan, parts, pool
        self.renderer = Renderer(index, plan.recipe)

    def __getitem__(self, task: tuple[int, int, int | None]) -> Batch:
        step, part, buffer = task
        items = self.plan.items(step, part, self.parts)
        if buffer is None:
            return self.renderer.render(items)
        batch = self.renderer.render(items, self.pool.buffers[buffer])
        return dataclasses.replace(batch, images=Rendered(self.pool.number, buffer))


class _Tasks:
    """(step, part) with the buffer for it, taken when the loader sends the task to a worker."""

    def __init__(self, places: list[tuple[int, int]], pool: Pool):
        self.places, self.pool = places, pool

    def __iter__(self) -> Iterator[tuple[int, int, int | None]]:
        return ((*place, self.pool.take()) for place in self.places)


class _Units(IterableDataset):
    """The items of units, one at a time; worker w takes every n-th group, so images decode once."""

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
    plan: Plan, index: Index, steps: Iterable[int], slices: range, parts: int, workers: int | None, pin: bool
) -> Iterable[Batch]:
    """Slices `slices` (this rank's, one an accumulation step) out of `parts`, of each step in turn."""
    places = [(step, part) for step in steps for part in slices]
    size, slots = plan.recipe.size, plan.recipe.group_size
    # two for each worker's tasks; unless copied to pinned memory, one that arrives and one still being read
    workers = resolve_workers(workers, pin)
    count = min(2 * workers + (0 if pin else 2), len(places)) if workers else 0
    pool = Pool(count, (plan.batch_groups // parts, slots, 3, size, size))
    return _loader(_Steps(plan, index, parts, pool), workers, pin, sampler=_Tasks(places, pool))


def unit_loader(units: list[Unit], index: Index, recipe: Recipe, workers: int | None, pin: bool) -> Iterable[Batch]:
    """Every item of the units, each alone; several workers interleave groups."""
    return _loader(_Units(units, index, recipe), workers, pin)


class _EvaluationImages(Dataset):
    def __init__(self, index: Index, rows: range, size: int, crop: float):
        self.index, self.rows, self.size, self.crop = index, rows, size, crop

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> torch.Tensor:
        number = self.rows[place]
        shard = int(np.searchsorted(self.index.starts, number, side="right")) - 1
        image = self.index.image(shard, number - int(self.index.starts[shard]))
        return torch.from_numpy(center_view(image, self.size, self.crop))


def evaluation_loader(
    index: Index, rows: range, size: int, crop: float, batch: int, workers: int | None, pin: bool
) -> Iterable[torch.Tensor]:
    """The samples `rows` in index order, as uint8 (batch, 3, size, size)."""
    return _loader(_EvaluationImages(index, rows, size, crop), workers, pin, batch_size=batch)


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
        # its own generator: a loader must not draw from the global one, or resuming would shift it
        generator=torch.Generator().manual_seed(0),
    )


def _start_worker(_: int) -> None:
    # what a forked worker inherited must not be collected there: a connection's end closes the parent's too
    gc.freeze()
    torch.set_num_threads(1)
    ignore_job_signals()
