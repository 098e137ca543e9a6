"""What bench/store.py compares: the store, and raw memory maps of the same numbers."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from experiment import imaginary_shards

from pipeline.batches.batch import Batch
from pipeline.batches.plan import Item, Plan, Unit, training_plan
from pipeline.config.schema import Recipe, Student
from pipeline.shards.index import Index
from pipeline.shards.indexing import write_index
from pipeline.store.kinds import KINDS, payload_width
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.writer import StoreWriter
from pipeline.training.teachers import read_predictions
from pipeline.views.draw import group_count

SHARDS, SAMPLES, CLASSES, TOP_K = 50, 1000, 1000, 10
UNREAD = torch.empty(0)


def make_index(folder: Path) -> Index:
    """An index of shards that do not exist: nothing here reads an image."""
    shards = imaginary_shards([SAMPLES] * SHARDS, CLASSES)
    write_index(folder / "index.json", str(folder), [str(label) for label in range(CLASSES)], shards)
    return Index(folder / "index.json")


@dataclass(frozen=True)
class Case:
    """A kind in a number of views, with random predictions, the same for every layout."""

    index: Index
    kind: str
    views: int

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(block=self.views)

    @property
    def width(self) -> int:
        return payload_width(self.kind, CLASSES, TOP_K)

    @property
    def rows(self) -> int:
        return SHARDS * SAMPLES * self.views

    @cached_property
    def argmax(self) -> np.ndarray:
        """uint16 (shards, views, samples)."""
        return np.random.default_rng(0).integers(0, CLASSES, (SHARDS, self.views, SAMPLES), np.uint16)

    @cached_property
    def payload(self) -> np.ndarray:
        """(shards, views, samples, width): any bits, but top-k classes are classes, the first being the argmax."""
        rng, dtype = np.random.default_rng(1), np.dtype(KINDS[self.kind].dtype)
        shape = (SHARDS, self.views, SAMPLES, self.width)
        payload = np.frombuffer(bytearray(rng.bytes(int(np.prod(shape)) * dtype.itemsize)), dtype).reshape(shape)
        if self.kind == "topk":
            payload[..., :TOP_K] %= CLASSES
            payload[..., 0] = self.argmax
        return payload

    @cached_property
    def checks(self) -> np.ndarray:
        """uint64 (shards, views, groups)."""
        shape = (SHARDS, self.views, group_count(SAMPLES, self.recipe.group_size))
        return np.random.default_rng(2).integers(0, 2**63, shape, np.uint64)

    @cached_property
    def plan(self) -> Plan:
        return training_plan(self.index, self.recipe, Student(), self.views)

    def holds(self, shard: int, view: int, argmax: np.ndarray, payload: np.ndarray | None = None) -> bool:
        """Whether these bits are what was written."""
        if not np.array_equal(argmax, self.argmax[shard, view]):
            return False
        return payload is None or self.payload[shard, view].tobytes() == payload.tobytes()


class Layout:
    """Predictions of a case, stored in one way in a folder."""

    def __init__(self, folder: Path, case: Case):
        self.folder, self.case = folder, case

    def write(self) -> None: ...

    def open(self) -> None: ...

    def forget(self) -> None:
        """Empty the Python caches."""

    def view(self, shard: int, view: int) -> Any:
        """Read one view of a shard."""

    def step(self, items: list[Item], members: list[np.ndarray]) -> None:
        """Read the groups of a training step."""

    def intact(self, shard: int, view: int) -> bool:
        """Whether a view is read as it was written."""
        return self.case.holds(shard, view, *self.view(shard, view))


class Ours(Layout):
    """pipeline.store.reader.Store; a step is read as training does: the groups' checks compared, tensors made."""

    def write(self) -> None:
        case = self.case
        identity = StoreIdentity(case.index.fingerprint, case.recipe, {"model": "none"})
        store = StoreWriter.create(str(self.folder), identity, case.index, case.views, case.kind, TOP_K, "float32")
        for shard in range(SHARDS):
            buffers = {"argmax": case.argmax[shard]}
            if case.width:
                buffers[case.kind] = case.payload[shard]
            store.write_unit(Unit(shard, 0), buffers, case.checks[shard])

    def open(self) -> None:
        self.store = Store.open(str(self.folder), self.case.index, self.case.recipe)

    def forget(self) -> None:
        self.store._cache.clear()

    def view(self, shard: int, view: int) -> tuple[np.ndarray, np.ndarray | None]:
        read = self.store.read(shard, view, self.case.kind)
        return read.argmax, read.payload

    def step(self, items: list[Item], members: list[np.ndarray]) -> None:
        checks = [int(self.case.checks[item.shard, item.view, item.group]) for item in items]
        labels = torch.empty((len(items), self.case.recipe.group_size))
        batch = Batch(
            items, members, checks, UNREAD, labels, weights=UNREAD, partner=UNREAD, lam=UNREAD, box=UNREAD
        )
        read_predictions(self.store, batch, self.case.kind)


class Mapped(Layout):
    """The same argmax and payload, row after row of a view, as raw memory maps; copied out, not checked."""

    def _maps(self, mode: Literal["r", "w+"]) -> list[np.memmap]:
        shape, dtype = (self.case.views, SHARDS * SAMPLES), np.dtype(KINDS[self.case.kind].dtype)
        maps: list[np.memmap] = [np.memmap(self.folder / "argmax", np.dtype(np.uint16), mode, shape=shape)]
        if self.case.width:
            maps.append(np.memmap(self.folder / "payload", dtype, mode, shape=(*shape, self.case.width)))
        return maps

    def write(self) -> None:
        self.folder.mkdir()
        maps = self._maps("w+")
        for shard in range(SHARDS):
            rows = slice(shard * SAMPLES, (shard + 1) * SAMPLES)
            maps[0][:, rows] = self.case.argmax[shard]
            if self.case.width:
                maps[1][:, rows] = self.case.payload[shard]
        for mapped in maps:
            mapped.flush()

    def open(self) -> None:
        self.maps = self._maps("r")

    def view(self, shard: int, view: int) -> list[np.ndarray]:
        return [np.array(mapped[view, shard * SAMPLES : (shard + 1) * SAMPLES]) for mapped in self.maps]

    def step(self, items: list[Item], members: list[np.ndarray]) -> None:
        for item, chosen in zip(items, members, strict=True):
            _ = [np.asarray(mapped[item.view])[item.shard * SAMPLES + chosen] for mapped in self.maps]
