"""Reading the store of the teacher's answers: a view of a shard, or a whole unit, checked.

Chunks are their bytes followed by their CRC-32C; they are read without zarr, which costs ten times as much, takes a
missing chunk for the fill value, and tells damage from a lack of memory by no means.
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
from pipeline.store.encoding import FILL, KINDS, SHARDED
from pipeline.store.layout import StoreLayout, open_group, store_exists
from pipeline.views.draw import group_count, recipe_fingerprint


@dataclass(frozen=True)
class StoreIdentity:
    """All that an answer depends on beside row and view."""

    index: str
    """Fingerprint of the training index."""
    recipe: Recipe
    teacher: dict[str, Any]
    """Name, weights' hash, normalisation, input size."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        return {"index": self.index, "recipe": recipe_fingerprint(self.recipe), "teacher": self.teacher}


@dataclass(frozen=True)
class StoredPredictions:
    """One view of one shard.

    argmax uint16 (samples,); payload (samples, width) or None; check uint64 (groups,).
    """

    argmax: np.ndarray
    payload: np.ndarray | None
    check: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Of an array: what is read at once."""

    chunks: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of it, without its checksum."""
        return math.prod(self.chunks) * self.dtype.itemsize


class Store(StoreLayout):
    """An open store: `Store.open`."""

    def __init__(self, path: str, group: zarr.Group, index: Index, recipe: Recipe):
        super().__init__(path, group, index, recipe)
        self.keep = 32  # chunks of each array at hand; a little more than the order's open shards
        self._cache: dict[str, OrderedDict] = defaultdict(OrderedDict)
        self._layouts: dict[str, Layout] = {}

    @classmethod
    def open(cls, path: str, index: Index, recipe: Recipe) -> Self:
        """Open for reading.

        Raises:
            PipelineError: no store at `path`.
            UsageError: it is of another format, index or recipe.
        """
        if not store_exists(path):
            raise PipelineError(
                f"{path}: no store",
                expected="the teacher's answers for this recipe, index and teacher",
                found="nothing",
                do="compute it: dvc repro -f teacher-logits (or pipeline teacher-logits)",
            )
        store = cls(path, open_group(path, "r"), index, recipe)
        store._refuse_other({"index": index.fingerprint, "recipe": recipe_fingerprint(recipe)})
        store._refuse_unsound()
        for name in store.arrays():
            store._refuse_other_layout(name)
        return store

    def read(self, shard: int, view: int, kind: str = "argmax") -> StoredPredictions:
        """A view of a shard. The returned arrays are a cache's: don't write into them.

        Raises:
            Damaged: the unit is missing or damaged.
        """
        block, place = divmod(view, self.recipe.block)
        argmax, check = self._cached("argmax", shard, block * self.recipe.block, self._read_argmax)
        payload = None
        if kind != "argmax":
            views = self.recipe.repeats if kind in SHARDED else self.recipe.block
            first = view // views * views
            payload = self._cached(kind, shard, first, lambda *at: self._read_payload(kind, *at))[view - first]
        groups = group_count(int(self.index.samples[shard]), self.recipe.group_size)
        return StoredPredictions(argmax[place], payload, check[place, :groups])

    def read_unit(self, unit: Unit) -> np.ndarray:
        """A whole unit's argmax, uint16 (block, samples).

        Raises:
            Damaged: the unit is missing or damaged.
        """
        return self._read_argmax(unit.shard, unit.block * self.recipe.block)[0]

    def read_check(self, unit: Unit) -> np.ndarray:
        """A unit's check, uint64 (block, slots).

        Raises:
            Damaged: it is missing or damaged.
        """
        return self._read_chunk("check", unit.shard, unit.block * self.recipe.block)[:, 0]

    def check_unit(self, unit: Unit, kind: str) -> None:
        """Read a unit whole, past the cache.

        Raises:
            Damaged: it is missing or damaged.
        """
        first, views = unit.block * self.recipe.block, self.recipe.repeats
        _, check = self._read_argmax(unit.shard, first)
        if kind in SHARDED:
            for view in range(first, first + self.recipe.block, views):
                self._read_payload(kind, unit.shard, view, check)
        elif kind != "argmax":
            self._read_payload(kind, unit.shard, first, check)

    def _cached(self, name: str, shard: int, first: int, read: Callable[[int, int], Any]) -> Any:
        kept = self._cache[name]
        if (shard, first) not in kept:
            kept[shard, first] = read(shard, first)
            if len(kept) > self.keep:
                kept.popitem(last=False)
        kept.move_to_end((shard, first))
        return kept[shard, first]

    def _read_argmax(self, shard: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """A unit's argmax (block, samples) and check (block, slots), from its first view on."""
        check = self._read_chunk("check", shard, first)[:, 0]
        argmax = self._read_chunk("argmax", shard, first)[:, : int(self.index.samples[shard])]
        if (argmax == FILL).any():
            raise self._damage("argmax", shard, first, "the fill value, which no answer has")
        self._compare("argmax", shard, first, argmax, check)
        return argmax, check

    def _read_payload(self, kind: str, shard: int, first: int, check: np.ndarray | None = None) -> np.ndarray:
        """A kind's (views, samples, width), the views being those of a chunk, from its first on."""
        block, samples = self.recipe.block, int(self.index.samples[shard])
        all_views = self._cached("argmax", shard, first // block * block, self._read_argmax)[1] if check is None else check
        payload = (self._read_inner if kind in SHARDED else self._read_chunk)(kind, shard, first)[:, :samples]
        self._compare(kind, shard, first, payload, all_views[first % block : first % block + len(payload)])
        return payload

    def _compare(self, name: str, shard: int, first: int, values: np.ndarray, check: np.ndarray) -> None:
        for place, number in enumerate(check[:, self.slots + KINDS.index(name)]):
            if checksum(values[place]) != number:
                raise self._damage(name, shard, first + place, "a checksum that is not the recorded one")

    def _read_chunk(self, name: str, shard: int, view: int) -> np.ndarray:
        """The chunk of a plain array that holds a view of a shard: its bytes, then their CRC-32C."""
        layout = self._layout(name)
        data = self._read(name, shard, view, 0, None, layout.size)
        return np.frombuffer(data, layout.dtype).reshape(layout.chunks)

    def _read_inner(self, name: str, shard: int, view: int) -> np.ndarray:
        """The inner chunk of a zarr shard that begins with a view.

        A zarr shard is its inner chunks, then an index of (offset, bytes) of each, 2 x uint64; each of these is
        followed by its CRC-32C.
        """
        layout, views = self._layout(name), self.recipe.repeats
        count = self.recipe.block // views
        index = self._read(name, shard, view, count * (layout.size + 4), None, count * 16)
        offset, size = np.frombuffer(index, "<u8").reshape(count, 2)[view % self.recipe.block // views].tolist()
        if size != layout.size + 4 or offset % size or offset >= count * size:
            raise self._damage(name, shard, view, f"an index of {size} bytes at {offset}")
        data = self._read(name, shard, view, offset, offset + size, layout.size)
        return np.frombuffer(data, layout.dtype).reshape(layout.chunks)

    def _read(self, name: str, shard: int, view: int, start: int, end: int | None, size: int) -> memoryview:
        """So many bytes of a unit's file, which their CRC-32C follows.

        What is missing or damaged is read once more before it is called so: units are computed anew for that.
        """
        path, found = self._chunk_path(name, shard, view // self.recipe.block), ""
        for _ in range(2):
            try:
                data = self._bytes(path, start, end)
            except FileNotFoundError:
                found = "missing: the unit was never written or was removed"
                continue
            except Exception as error:  # nearly anything is raised by servers' clients, and where memory is short
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

    def _layout(self, name: str) -> Layout:
        if name not in self._layouts:
            if name not in self.arrays():
                raise UsageError(
                    f"{self.path}: no {name} in the store",
                    expected=name,
                    found=", ".join(self.arrays()),
                    do=f"set teacher_logits.kind to {name} and run teacher-logits again",
                )
            shape = self.array_metadata(name)["shape"]
            settings = self._settings(name, shape[0], shape[-1])
            self._layouts[name] = Layout(settings["chunks"], np.dtype(settings["dtype"]).newbyteorder("<"))
        return self._layouts[name]

    def _damage(self, name: str, shard: int, view: int, found: str) -> Damaged:
        block = view // self.recipe.block
        return Damaged(
            f"{self.path}/{name}: block {block} of shard {self.index.names[shard]}, view {view}",
            expected="what the teacher wrote",
            found=found,
            do="compute it again: dvc repro -f teacher-logits (or pipeline teacher-logits)",
        )


def checksum(values: np.ndarray) -> int:
    """CRC-32C of what a kind holds of one view of a shard."""
    return google_crc32c.value(np.ascontiguousarray(values).tobytes())
