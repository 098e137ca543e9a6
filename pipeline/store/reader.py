"""Reading a store: a view of a shard, or a complete unit, with every checksum compared.

A chunk is its bytes followed by their CRC-32C. Chunks are read without zarr, which is ten times slower, reads a
missing chunk as the fill value, and cannot tell damage from a lack of memory.
"""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import google_crc32c
import numpy as np
import zarr

from pipeline.batches.plan import Unit
from pipeline.common.errors import Damaged, PipelineError, UsageError
from pipeline.config.schema import Recipe
from pipeline.config.validation import fingerprint
from pipeline.shards.index import Index
from pipeline.store.kinds import KINDS, NO_CLASS
from pipeline.store.layout import MAKE_STORE, StoreLayout, open_group, store_exists
from pipeline.views.draw import group_count, recipe_fingerprint


@dataclass(frozen=True)
class StoreIdentity:
    """Everything that a prediction depends on, except its row and view."""

    index: str
    """The training index's fingerprint."""
    recipe: Recipe
    teacher: dict[str, Any]
    """See pipeline.models.teacher.describe_teacher."""
    sampling: dict[str, Any] | None = None
    """See pipeline.config.store_spec.sampling_identity."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        identity = {"index": self.index, "recipe": recipe_fingerprint(self.recipe), "teacher": self.teacher}
        return identity if self.sampling is None else identity | {"sampling": self.sampling}


@dataclass(frozen=True)
class StoredPredictions:
    """The stored predictions for one view of one shard: N samples in tar order, G groups."""

    argmax: np.ndarray
    """uint16 (N,)"""
    payload: np.ndarray | None
    """(N, payload_width); None for the kind argmax."""
    check: np.ndarray
    """uint64 (G,)"""


@dataclass(frozen=True)
class Chunk:
    """Shape and type of what is read at once from an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes without the CRC-32C."""
        return math.prod(self.shape) * self.dtype.itemsize


class Store(StoreLayout):
    """An open store; create it with `Store.open`."""

    def __init__(self, path: str, group: zarr.Group, index: Index, recipe: Recipe):
        super().__init__(path, group, index, recipe)
        self.cache_size = 32  # chunks per array; a little more than the shards that the plan keeps open
        self._cache: dict[str, OrderedDict] = defaultdict(OrderedDict)
        self._chunks: dict[str, Chunk] = {}

    @classmethod
    def open(cls, path: str, index: Index, recipe: Recipe) -> Self:
        """Open for reading.

        Raises:
            PipelineError: no store at `path`.
            UsageError: it has a different format, index or recipe.
        """
        if not store_exists(path):
            raise PipelineError(
                f"{path}: no store",
                expected="the teacher's predictions for this recipe, index and teacher",
                found="nothing",
                do=f"run: {MAKE_STORE}",
            )
        store = cls(path, open_group(path, "r"), index, recipe)
        store._check_attributes({"index": index.fingerprint, "recipe": recipe_fingerprint(recipe)})
        for name in store.arrays():
            store._check_array(name)
        return store

    def read(self, shard: int, view: int, kind: str = "argmax") -> StoredPredictions:
        """Read a view of a shard. The arrays belong to a cache: do not write into them.

        Raises:
            Damaged: the unit is missing or damaged.
            UsageError: the store does not hold this kind.
            Unreadable: a disk or server did not answer, or memory ran out.
        """
        block, place = divmod(view, self.recipe.block)
        argmax, check = self._cached("argmax", shard, block * self.recipe.block, self._read_argmax)
        payload = None
        if kind != "argmax":
            views = self.recipe.repeats if KINDS[kind].sharded else self.recipe.block
            first = view // views * views
            payload = self._cached(kind, shard, first, lambda *at: self._read_payload(kind, *at))[view - first]
        groups = group_count(int(self.index.samples[shard]), self.recipe.group_size)
        return StoredPredictions(argmax[place], payload, check[place, :groups])

    def read_unit(self, unit: Unit) -> np.ndarray:
        """Read a unit's argmax, uint16 (block, samples).

        Raises:
            Damaged: the unit is missing or damaged.
        """
        return self._read_argmax(unit.shard, unit.block * self.recipe.block)[0]

    def read_check(self, unit: Unit) -> np.ndarray:
        """Read a unit's check, uint64 (block, groups + kinds).

        Raises:
            Damaged: it is missing or damaged.
        """
        return self._read_chunk("check", unit.shard, unit.block * self.recipe.block)[:, 0]

    def check_unit(self, unit: Unit, kind: str) -> None:
        """Read all of a unit, bypassing the cache.

        Raises:
            Damaged: it is missing or damaged.
        """
        first, views = unit.block * self.recipe.block, self.recipe.repeats
        _, check = self._read_argmax(unit.shard, first)
        if KINDS[kind].sharded:
            for view in range(first, first + self.recipe.block, views):
                self._read_payload(kind, unit.shard, view, check)
        elif kind != "argmax":
            self._read_payload(kind, unit.shard, first, check)

    def _cached(self, name: str, shard: int, first: int, read: Callable[[int, int], Any]) -> Any:
        cache = self._cache[name]
        if (shard, first) not in cache:
            cache[shard, first] = read(shard, first)
            if len(cache) > self.cache_size:
                cache.popitem(last=False)
        cache.move_to_end((shard, first))
        return cache[shard, first]

    def _read_argmax(self, shard: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Read argmax (block, samples) and check (block, groups + kinds) of the unit whose first view is `first`."""
        check = self._read_chunk("check", shard, first)[:, 0]
        argmax = self._read_chunk("argmax", shard, first)[:, : int(self.index.samples[shard])]
        if (argmax == NO_CLASS).any():
            raise self._damage("argmax", shard, first, "the fill value, which no prediction has")
        self._compare("argmax", shard, first, argmax, check)
        return argmax, check

    def _read_payload(self, kind: str, shard: int, first: int, check: np.ndarray | None = None) -> np.ndarray:
        """Read a chunk of a kind's own array, (views, samples, width), whose first view is `first`."""
        block, samples = self.recipe.block, int(self.index.samples[shard])
        unit = first // block * block
        recorded = self._cached("argmax", shard, unit, self._read_argmax)[1] if check is None else check
        payload = (self._read_inner if KINDS[kind].sharded else self._read_chunk)(kind, shard, first)[:, :samples]
        self._compare(kind, shard, first, payload, recorded[first % block : first % block + len(payload)])
        return payload

    def _compare(self, name: str, shard: int, first: int, values: np.ndarray, check: np.ndarray) -> None:
        for place, number in enumerate(check[:, self.checksum_slot(name)]):
            if checksum(values[place]) != number:
                raise self._damage(name, shard, first + place, "a checksum that differs from the recorded one")

    def _read_chunk(self, name: str, shard: int, view: int) -> np.ndarray:
        """Read the chunk of an unsharded array that holds a view of a shard."""
        chunk = self._chunk(name)
        data = self._read(name, shard, view, 0, None, chunk.size)
        return np.frombuffer(data, chunk.dtype).reshape(chunk.shape)

    def _read_inner(self, name: str, shard: int, view: int) -> np.ndarray:
        """Read the inner chunk of a zarr shard that begins with a view.

        A zarr shard is its inner chunks, then an index of 2 x uint64 per chunk (offset, bytes); chunks and index are
        each followed by their CRC-32C.
        """
        chunk, views = self._chunk(name), self.recipe.repeats
        count = self.recipe.block // views
        index = self._read(name, shard, view, count * (chunk.size + 4), None, count * 16)
        offset, size = np.frombuffer(index, "<u8").reshape(count, 2)[view % self.recipe.block // views].tolist()
        if size != chunk.size + 4 or offset % size or offset >= count * size:
            raise self._damage(name, shard, view, f"an index of {size} bytes at {offset}")
        data = self._read(name, shard, view, offset, offset + size, chunk.size)
        return np.frombuffer(data, chunk.dtype).reshape(chunk.shape)

    def _read(self, name: str, shard: int, view: int, start: int, end: int | None, size: int) -> memoryview:
        """Read `size` bytes of a unit's file and compare the CRC-32C after them.

        A missing or damaged unit is recomputed, so the bytes are read twice before they are called that.
        """
        path, found = self._chunk_path(name, shard, view // self.recipe.block), ""
        for _ in range(2):
            try:
                data = self._bytes(path, start, end)
            except FileNotFoundError:
                found = "missing: the unit was never written or was removed"
                continue
            except Exception as error:  # servers' clients and a lack of memory raise nearly anything
                raise self._unreadable(name, error) from error
            if len(data) != size + 4:
                found = f"{len(data)} bytes instead of {size + 4}"
            elif google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
                found = "bytes that do not match their CRC-32C"
            else:
                return memoryview(data)[:-4]
        raise self._damage(name, shard, view, found)

    def _bytes(self, path: str, start: int, end: int | None) -> bytes:
        if not self._local:
            return self._filesystem.cat_file(path, start=start or None, end=end)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def _chunk(self, name: str) -> Chunk:
        if name not in self._chunks:
            if name not in self.arrays():
                raise UsageError(
                    f"{self.path}: no {name} in the store",
                    expected=name,
                    found=", ".join(self.arrays()),
                    do=f"set teacher_logits.kind to {name}, and run: {MAKE_STORE}",
                )
            shape = self.array_metadata(name)["shape"]
            settings = self.dimensions.array(name, shape[0], shape[-1])
            self._chunks[name] = Chunk(settings["chunks"], np.dtype(settings["dtype"]).newbyteorder("<"))
        return self._chunks[name]

    def _damage(self, name: str, shard: int, view: int, found: str) -> Damaged:
        block = view // self.recipe.block
        return Damaged(
            f"{self.path}/{name}: block {block} of shard {self.index.names[shard]}, view {view}",
            expected="the bytes as written",
            found=found,
            do=f"compute it again: {MAKE_STORE}",
        )


def checksum(values: np.ndarray) -> int:
    """CRC-32C of one view of a shard, in one kind."""
    return google_crc32c.value(np.ascontiguousarray(values).tobytes())
