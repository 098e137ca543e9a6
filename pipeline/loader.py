"""Items to rendered groups to device batches.

Workers only render; the process that trains attaches the answers and compares checksums. On the
device a group always has `group_size` slots; an unused slot has weight 0, so shapes never change.
"""

import dataclasses
import gc
import itertools
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline.config import Recipe
from pipeline.errors import PipelineError
from pipeline.plan import Item, Plan, Unit, group_members, unit_items
from pipeline.recipe import draw_mix, draw_view, group_check, witness
from pipeline.shards import Index
from pipeline.signals import heed_the_parent_alone
from pipeline.store import Answers, Store
from pipeline.views import center_view, render


@dataclass
class Groups:
    """Some groups, each in one view. G groups, S slots, pixels P x P."""

    items: list[Item]
    members: list[np.ndarray]
    """Positions in the shard, int64, in slot order."""
    checks: list[int]
    """recipe.group_check of each."""
    images: torch.Tensor
    """uint8 (G, S, 3, P, P): views before mixing."""
    labels: torch.Tensor
    """int64 (G, S)"""
    weights: torch.Tensor
    """float32 (G, S): 1 for a sample, 0 for an unused slot."""
    partner: torch.Tensor
    """int64 (G, S)"""
    lam: torch.Tensor
    """float32 (G,)"""
    box: torch.Tensor
    """int64 (G, 4): left, top, right, bottom; empty unless cutmix."""
    decodes: int = 0
    """Images decoded for these views."""

    @property
    def views(self) -> int:
        """How many views of samples there are, unused slots left out."""
        return sum(len(members) for members in self.members)

    def tensors(self) -> dict[str, torch.Tensor]:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if isinstance(value, torch.Tensor)}

    def _each(self, change) -> "Groups":
        return dataclasses.replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def pin_memory(self) -> "Groups":
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Groups":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))


class Renderer:
    """Renders items; keeps the last group's decoded images for its further views."""

    def __init__(self, index: Index, recipe: Recipe):
        self.index, self.recipe = index, recipe
        self.names = tuple(index.names)
        self.samples = tuple(int(samples) for samples in index.samples)
        self._decoded: tuple[tuple, list[np.ndarray]] = ((), [])

    def __getstate__(self):
        return self.__dict__ | {"_decoded": ((), [])}

    def members(self, item: Item) -> np.ndarray:
        return group_members(self.recipe, self.names, self.samples, item)

    def render(self, items: list[Item], images: torch.Tensor | None = None) -> Groups:
        """Groups whose pictures lie in `images`, whatever it held; without it, in memory of their own.

        Raises:
            PipelineError: a shard or the index is damaged.
        """
        recipe, count, slots = self.recipe, len(items), self.recipe.group_size
        if images is None:
            images = _memory(count, slots, 3, recipe.size, recipe.size)
        groups = Groups(
            items=items,
            members=[self.members(item) for item in items],
            checks=[],
            images=images,
            labels=torch.zeros(count, slots, dtype=torch.int64),
            weights=torch.zeros(count, slots),
            partner=torch.zeros(count, slots, dtype=torch.int64),
            lam=torch.ones(count),
            box=torch.zeros(count, 4, dtype=torch.int64),
        )
        for number, (item, members) in enumerate(zip(items, groups.members, strict=True)):
            self._render_one(groups, number, item, members)
        return groups

    def _render_one(self, groups: Groups, number: int, item: Item, members: np.ndarray) -> None:
        decoded, fresh = self._decode(item, members)
        groups.decodes += fresh
        rows = self.index.rows(item.shard)
        keys = [rows["key"][position].decode() for position in members]
        pictures = groups.images[number].numpy()
        drawn = [
            draw_view(self.recipe, key, item.view, image.shape[1], image.shape[0])
            for key, image in zip(keys, decoded, strict=True)
        ]
        for image, params, picture in zip(decoded, drawn, pictures, strict=False):  # there may be more slots
            render(image, params, self.recipe, out=picture)
        pictures[len(members) :] = 0
        mix = draw_mix(self.recipe, self.names[item.shard], item.group, item.view, len(members))
        left, top, width, height = mix.box
        groups.labels[number, : len(members)] = torch.from_numpy(rows["label"][members].astype(np.int64))
        groups.weights[number, : len(members)] = 1
        groups.partner[number] = torch.from_numpy(mix.partner)
        groups.lam[number] = mix.lam
        groups.box[number] = torch.tensor([left, top, left + width, top + height])
        seen = witness(item.group, item.view, len(members))
        groups.checks.append(group_check("\n".join(keys).encode(), mix, pictures[seen]))

    def _decode(self, item: Item, members: np.ndarray) -> tuple[list[np.ndarray], int]:
        """A group's images, and how many had to be decoded: none while its views follow one another."""
        identity = (item.shard, item.group, item.view // self.recipe.block)
        if self._decoded[0] == identity:
            return self._decoded[1], 0
        images = [self.index.image(item.shard, int(position)) for position in members]
        self._decoded = (identity, images)
        return images, len(images)


def on_device(batches: Iterable[Groups], device: torch.device) -> Iterator[Groups]:
    """Each batch on the device; a GPU copies it on a stream of its own while it computes the step before."""
    if device.type != "cuda":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for groups in batches:
        with torch.cuda.stream(copying):
            moved = groups.to(device)
        computing.wait_stream(copying)
        for tensor in moved.tensors().values():
            tensor.record_stream(computing)
        yield moved


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, without waiting for what it computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _memory(*shape: int) -> torch.Tensor:
    """uint8, whatever it holds; a worker's is shared at once, so that handing it over copies nothing."""
    return _shared(*shape) if get_worker_info() else torch.empty(shape, dtype=torch.uint8)


def _shared(*shape: int) -> torch.Tensor:
    # as torch's own default_collate does
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


_pools, _pool_numbers = weakref.WeakValueDictionary(), itertools.count()


class _Pool:
    """Shared buffers that workers render slices into again and again.

    Fresh shared memory takes a tenth to a quarter of a worker's time: the kernel clears and maps every
    page. Memory used again takes none, but must not change while anyone sees it. So a buffer is always
    one of three, and the process that trains alone decides which: free; taken by a task that goes to a
    worker; or lent, from the arrival of the task's result until nothing in this process refers to its
    memory any more: no tensor, view, storage or NumPy array. What a worker never gives back, having
    failed, stays taken. Where none is free, the worker makes memory of its own.
    """

    def __init__(self, count: int, shape: tuple[int, ...]):
        self.buffers = [_shared(*shape) for _ in range(count)]
        self.free, self.taken = list(range(count)), set()
        self.number = next(_pool_numbers)
        _pools[self.number] = self

    def take(self) -> int | None:
        if not self.free:
            return None
        buffer = self.free.pop()  # the last let go of: no more are touched than are needed at once
        self.taken.add(buffer)
        return buffer

    def lend(self, buffer: int) -> torch.Tensor:
        self.taken.remove(buffer)  # a KeyError if it is not with a worker
        # the tensor's storage, which all that sees its pixels keeps alive, owns this very array
        array = self.buffers[buffer].numpy()
        weakref.finalize(array, self.free.append, buffer).atexit = False
        return torch.from_numpy(array)


class _Rendered(NamedTuple):
    """Goes from a worker in place of the pixels in a buffer, and arrives as the buffer's tensor.

    Unpickling makes it, so that the loader's thread that pins memory finds the tensor too.
    """

    pool: int
    buffer: int

    def __reduce__(self):
        return _arrived, tuple(self)


def _arrived(pool: int, buffer: int) -> torch.Tensor:
    return _pools[pool].lend(buffer)


def mixed(groups: Groups) -> torch.Tensor:
    """The groups' pictures after Mixup or CutMix, float32 (G * S, 3, P, P) in 0..255.

    timm.data.mixup.Mixup._mix_batch with the drawn lambda, box and partners. Elementwise, so the
    same bits for any number of groups at a time.
    """
    own = groups.images
    count, slots, _, size, _ = own.shape
    other = own[torch.arange(count, device=own.device)[:, None], groups.partner]
    left, top, right, bottom = (edge[:, None, None] for edge in groups.box.T)
    place = torch.arange(size, device=own.device)
    inside = (place >= left) & (place < right) & ((place[:, None] >= top) & (place[:, None] < bottom))
    boxed = (groups.box[:, 2] > groups.box[:, 0])[:, None, None, None, None]
    lam = groups.lam[:, None, None, None, None]
    own, other = own.float(), other.float()
    pasted = torch.where(inside[:, None, None], other, own)
    result = torch.where(boxed, pasted, own * lam + other * (1 - lam))
    return result.reshape(count * slots, 3, size, size)


def targets(groups: Groups, classes: int, smoothing: float) -> torch.Tensor:
    """Smoothed, mixed labels, float32 (G * S, classes): timm.data.mixup.mixup_target."""
    off, on = smoothing / classes, 1 - smoothing + smoothing / classes
    own = groups.labels
    other = own.gather(1, groups.partner)
    lam = groups.lam[:, None, None]
    smooth = [
        torch.full((*labels.shape, classes), off, device=labels.device).scatter_(2, labels[..., None], on)
        for labels in (own, other)
    ]
    return (smooth[0] * lam + smooth[1] * (1 - lam)).flatten(0, 1)


class _Steps(Dataset):
    """Map from (step, part, buffer or None) to that slice of the step, rendered."""

    def __init__(self, plan: Plan, index: Index, parts: int, pool: _Pool):
        self.plan, self.parts, self.pool = plan, parts, pool
        self.renderer = Renderer(index, plan.recipe)

    def __getitem__(self, task: tuple[int, int, int | None]) -> Groups:
        step, part, buffer = task
        items = self.plan.items(step, part, self.parts)
        if buffer is None:
            return self.renderer.render(items)
        groups = self.renderer.render(items, self.pool.buffers[buffer])
        return dataclasses.replace(groups, images=_Rendered(self.pool.number, buffer))


class _Tasks:
    """(step, part) with the buffer for it, taken when the loader sends the task to a worker."""

    def __init__(self, places: list[tuple[int, int]], pool: _Pool):
        self.places, self.pool = places, pool

    def __iter__(self) -> Iterator[tuple[int, int, int | None]]:
        return ((*place, self.pool.take()) for place in self.places)


class _Units(IterableDataset):
    """The items of units, one at a time; worker w takes every n-th group, so images decode once."""

    def __init__(self, units: list[Unit], index: Index, recipe: Recipe):
        self.units, self.renderer = units, Renderer(index, recipe)

    def __iter__(self) -> Iterator[Groups]:
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
    plan: Plan, index: Index, steps: Iterable[int], slices: range, parts: int, workers: int, pin: bool
) -> Iterable[Groups]:
    """Slices `slices` (this rank's, one an accumulation step) out of `parts`, of each step in turn."""
    places = [(step, part) for step in steps for part in slices]
    size, slots = plan.recipe.size, plan.recipe.group_size
    # two for each worker's tasks; unless copied to pinned memory, one that arrives and one still being read
    count = min(2 * workers + (0 if pin else 2), len(places)) if workers else 0
    pool = _Pool(count, (plan.batch_groups // parts, slots, 3, size, size))
    return _loader(_Steps(plan, index, parts, pool), workers, pin, sampler=_Tasks(places, pool))


def unit_loader(units: list[Unit], index: Index, recipe: Recipe, workers: int, pin: bool) -> Iterable[Groups]:
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
    index: Index, rows: range, size: int, crop: float, batch: int, workers: int, pin: bool
) -> Iterable[torch.Tensor]:
    """The samples `rows` in index order, as uint8 (batch, 3, size, size)."""
    return _loader(_EvaluationImages(index, rows, size, crop), workers, pin, batch_size=batch)


def _loader(dataset, workers: int, pin: bool, batch_size: int | None = None, sampler=None) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        # its own generator: a loader must not draw from the global one, or resuming would shift it
        generator=torch.Generator().manual_seed(0),
    )


def _start_worker(_: int) -> None:
    # what a forked worker inherited must not be collected there: a connection's end closes the parent's too
    gc.freeze()
    torch.set_num_threads(1)
    heed_the_parent_alone()


def stored_answers(store: Store, groups: Groups, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the store holds for each slot: argmax int64 (G * S,), payload (G * S, width) or None.

    Unused slots hold class 0 and zeros; their weight is 0.

    Raises:
        PipelineError: a unit is missing or damaged, or a group is not the one the teacher saw.
    """
    slots = groups.labels.shape[1]
    argmax = np.zeros((len(groups.items), slots), np.int64)
    payload = None
    for number, (item, members) in enumerate(zip(groups.items, groups.members, strict=True)):
        answers = store.read(item.shard, item.view, kind)
        _compare(store, answers, groups, number)
        argmax[number, : len(members)] = answers.argmax[members]
        if answers.payload is not None:
            if payload is None:
                payload = np.zeros((*argmax.shape, answers.payload.shape[1]), answers.payload.dtype)
            payload[number, : len(members)] = answers.payload[members]
    flat = None if payload is None else torch.from_numpy(payload).flatten(0, 1)
    return torch.from_numpy(argmax).flatten(), flat


def _compare(store: Store, answers: Answers, groups: Groups, number: int) -> None:
    item, here = groups.items[number], groups.checks[number]
    stored = int(answers.check[item.group])
    if stored != here:
        versions = ", ".join(f"{name} {version}" for name, version in store.group.attrs["versions"].items())
        raise PipelineError(
            f"{store.path}: group {item.group} of shard {store.index.names[item.shard]}, view {item.view}",
            expected=f"the pictures and mixing that the teacher saw (check {stored:016x}; written with {versions})",
            found=f"check {here:016x}: another order, lambda, partner or pixel",
            do="install the versions that wrote the store, or compute another with these",
        )
