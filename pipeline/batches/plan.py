"""The order of training and of the teacher's work, as pure functions: no I/O and no state to save.

The order is one endless sequence of (group, view) items. Cycle c visits every group once, in a
seeded permutation that keeps a few shards open at a time, each group followed by its r views,
r * (c mod V/r) + 0 .. r-1. Step t is items [t * G, (t + 1) * G), G being the global batch in groups.
So resuming is arithmetic, and what a step holds does not depend on ranks or workers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from pipeline.common.streams import permutation, stream_key
from pipeline.config.schema import Recipe, Training
from pipeline.views.draw import draw_groups, group_count


@dataclass(frozen=True)
class Item:
    """A group in one view: its samples are mixed with one another."""

    shard: int
    group: int
    """Number of the group within its shard."""
    view: int


@dataclass(frozen=True)
class Unit:
    """A block of views of a shard: what the teacher computes and commits at once."""

    shard: int
    block: int


@dataclass(frozen=True)
class Plan:
    """Which groups a training step holds.

    Args:
        recipe: group size, block, repeats and seed.
        names: the shards' names.
        samples: samples per shard.
        views: V; views repeat after V / repeats cycles.
        batch_groups: G, groups per global batch.
        seed: of the order.
        open_shards: how many shards' groups are interleaved.
    """

    recipe: Recipe
    names: tuple[str, ...]
    samples: tuple[int, ...]
    views: int
    batch_groups: int
    seed: int = 0
    open_shards: int = 16

    def __post_init__(self):
        assert self.views % self.recipe.block == 0, "the configuration checks this"

    @cached_property
    def groups(self) -> int:
        """Groups in all shards: what one cycle visits."""
        return sum(group_count(samples, self.recipe.group_size) for samples in self.samples)

    @property
    def steps_per_epoch(self) -> int:
        """round(groups / G), at least 1: an epoch has as many items as there are groups."""
        return max(1, round(self.groups / self.batch_groups))

    def views_seen(self, epochs: int) -> int:
        """Distinct views of each image that this many epochs show if V does not limit them."""
        cycles = -(-epochs * self.steps_per_epoch * self.batch_groups // (self.groups * self.recipe.repeats))
        return cycles * self.recipe.repeats

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def items(self, step: int, number: int = 0, slices: int = 1) -> list[Item]:
        """The items of a step, or of slice `number` of its `slices` contiguous slices.

        Raises ValueError unless `slices` divides the batch's groups.
        """
        if self.batch_groups % slices:
            raise ValueError(f"{slices} slices do not divide {self.batch_groups} groups")
        share = self.batch_groups // slices
        first = step * self.batch_groups + number * share
        return [self.item(position) for position in range(first, first + share)]

    def item(self, position: int) -> Item:
        """The item at a position in the endless sequence."""
        repeats = self.recipe.repeats
        visit, copy = divmod(position, repeats)
        cycle, visit = divmod(visit, self.groups)
        shard, group = self._visits(cycle)[visit]
        return Item(int(shard), int(group), repeats * (cycle % (self.views // repeats)) + copy)

    def _visits(self, cycle: int) -> np.ndarray:
        if cycle not in self._cycles:
            for old in [known for known in self._cycles if known < cycle]:
                del self._cycles[old]
            self._cycles[cycle] = draw_cycle(self, cycle)
        return self._cycles[cycle]

    @cached_property
    def _cycles(self) -> dict[int, np.ndarray]:
        return {}

    def members(self, item: Item) -> np.ndarray:
        """Positions in the shard of a group's samples, int64 (members,), in slot order."""
        return group_members(self.recipe, self.names, self.samples, item)

    def weight(self, step: int) -> int:
        """Samples in a step over all ranks: the divisor of its loss."""
        return sum(len(self.members(item)) for item in self.items(step))


def group_members(recipe: Recipe, names: tuple[str, ...], samples: tuple[int, ...], item: Item) -> np.ndarray:
    block = item.view // recipe.block
    groups = _groups(recipe, names[item.shard], block, samples[item.shard])  # pyright: ignore[reportArgumentType] frozen
    return groups[item.group]


@lru_cache(maxsize=256)
def _groups(recipe: Recipe, shard: str, block: int, samples: int) -> list[np.ndarray]:
    return draw_groups(recipe, shard, block, samples)


def draw_cycle(plan: Plan, cycle: int) -> np.ndarray:
    """The visits of one cycle, int32 (groups, 2): shard and group.

    Shards are permuted and cut into windows of `open_shards`; the groups of a window are permuted.
    """
    identity = f"{plan.seed}\x1f{cycle}"
    shards = permutation(stream_key(plan.recipe.seed, "order", identity), len(plan.names))
    visits = []
    for start in range(0, len(shards), plan.open_shards):
        window = [
            (shard, group)
            for shard in shards[start : start + plan.open_shards]
            for group in range(group_count(plan.samples[shard], plan.recipe.group_size))
        ]
        order = permutation(stream_key(plan.recipe.seed, "order", f"{identity}\x1f{start}"), len(window))
        visits.append(np.array(window, np.int32).reshape(-1, 2)[order])
    return np.concatenate(visits)


class ShardSizes(Protocol):
    """What a plan needs to know of an index."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def samples(self) -> Iterable[int]: ...


def training_plan(index: ShardSizes, recipe: Recipe, training: Training, views: int) -> Plan:
    """The plan of a training run over an index."""
    return Plan(
        recipe,
        tuple(index.names),
        tuple(int(samples) for samples in index.samples),
        views,
        training.batch_size // recipe.group_size,
        training.seed,
        training.open_shards,
    )


def all_units(shards: int, views: int, recipe: Recipe) -> list[Unit]:
    """All units of V views, block by block, so that a store has all images' first views first."""
    return [Unit(shard, block) for block in range(views // recipe.block) for shard in range(shards)]


def unit_items(unit: Unit, recipe: Recipe, samples: int) -> list[Item]:
    """The items of a unit, group by group, so that each image is decoded once."""
    views = range(unit.block * recipe.block, (unit.block + 1) * recipe.block)
    return [
        Item(unit.shard, group, view)
        for group in range(group_count(samples, recipe.group_size))
        for view in views
    ]
