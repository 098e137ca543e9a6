"""The zarr store of the teacher's answers: how it is laid out, and reading a view of a shard.

Rows are laid out shard by shard with equal capacity, in tar order. Arrays: `argmax` (view, row),
a kind's own (view, row, ...), and `check` (view, shard, slot): 64 bits a group (see
recipe.group_check), then a checksum of what each kind holds of that view of that shard.

A unit's argmax is written last, so what exists is complete (pipeline.store_writer). `argmax`, `check` and
`topk` have one chunk a unit, its bytes followed by their CRC-32C; they are read without zarr, which
costs ten times as much and takes a missing chunk for the fill value. The dense kinds are zarr shards
of one unit, with inner chunks of the views that one visit wants (recipe.repeats).
"""

import json
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, Self

import fsspec
import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pipeline.answers import DTYPES, FILL, KINDS, SHARDED
from pipeline.config import Recipe
from pipeline.errors import IO_ERRORS, PipelineError, Unreadable, UsageError, reason
from pipeline.plan import Unit, all_units
from pipeline.recipe import group_count, recipe_fingerprint
from pipeline.sealed import read_description
from pipeline.shards import Index
from pipeline.strict import fingerprint

FORMAT = 2
NO_CHECK = 2**64 - 1
VERSIONS = ("numpy", "opencv-python-headless", "pillow", "timm", "torch", "torchvision", "zarr")


@dataclass(frozen=True)
class Identity:
    """All that an answer depends on beside row and view."""

    index: str
    """Fingerprint of the training index."""
    recipe: Recipe
    teacher: dict[str, Any]
    """Name, weights' hash, normalisation, input size."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.described())

    def described(self) -> dict[str, Any]:
        return {"index": self.index, "recipe": recipe_fingerprint(self.recipe), "teacher": self.teacher}


@dataclass(frozen=True)
class Answers:
    """One view of one shard.

    argmax uint16 (samples,); payload (samples, width) or None; check uint64 (groups,).
    """

    argmax: np.ndarray
    payload: np.ndarray | None
    check: np.ndarray


class Store:
    """An open store: `Store.open`."""

    def __init__(self, path: str, group: zarr.Group, index: Index, recipe: Recipe):
        self.path, self.group, self.index, self.recipe = path, group, index, recipe
        self.capacity = int(group.attrs["capacity"])
        self.classes = int(group.attrs["classes"])
        self.slots = max(group_count(int(samples), recipe.group_size) for samples in index.samples)
        self.keep = 32  # chunks of each array at hand; a little more than the order's open shards
        self._cache: dict[str, OrderedDict] = defaultdict(OrderedDict)
        self._arrays: dict[str, zarr.Array | None] = {}
        self._filesystem, self._root = fsspec.core.url_to_fs(path)
        self._local = "file" in np.atleast_1d(self._filesystem.protocol)

    @classmethod
    def open(cls, path: str, index: Index, recipe: Recipe) -> Self:
        """Open for reading.

        Raises:
            PipelineError: no store at `path`.
            UsageError: it is of another format, index or recipe.
        """
        try:
            there = exists(path)
        except IO_ERRORS as error:
            raise PipelineError(f"{path}: the store cannot be read", found=reason(error)) from error
        if not there:
            raise PipelineError(
                f"{path}: no store",
                expected="the teacher's answers for this recipe, index and teacher",
                found="nothing",
                do="compute it: dvc repro -f teacher-logits (or pipeline teacher-logits)",
            )
        store = cls(path, opened(path, "r"), index, recipe)
        store._refuse_other({"index": index.fingerprint, "recipe": recipe_fingerprint(recipe)})
        for name in store.arrays():
            store._refuse_other_layout(name)
        return store

    def _refuse_other(self, described: dict[str, Any]) -> None:
        for key, value in {"format": FORMAT, **described}.items():
            found = self.group.attrs.get(key)
            if found != value:
                raise UsageError(
                    f"{self.path}: the store's {key}",
                    expected=json.dumps(value),
                    found=json.dumps(found),
                    do="it belongs to another experiment: name the right store, or none",
                )

    @property
    def fingerprint(self) -> str:
        return self.group.attrs["fingerprint"]

    def arrays(self) -> list[str]:
        """`argmax`, `check` and the kinds that the store holds."""
        names = ("check", *KINDS)
        try:
            return sorted(name for name in names if self._filesystem.exists(f"{self._root}/{name}/zarr.json"))
        except IO_ERRORS as error:
            raise self._unreadable("", error) from error

    def _settings(self, name: str, views: int, width: int) -> dict[str, Any]:
        """What an array is made with: shape, chunks, codecs, names of dimensions."""
        block, shards, slots = self.recipe.block, len(self.index.names), self.slots + len(KINDS)
        rows = shards * self.capacity
        # zarr's default codecs let bit flips through
        settings: dict[str, Any] = {"compressors": [Crc32cCodec()], "dtype": np.uint64, "fill_value": NO_CHECK}
        if name == "check":
            shape, chunks, dimensions = (views, shards, slots), (block, 1, slots), ["view", "shard", "slot"]
        elif name == "argmax":
            shape, chunks, dimensions = (views, rows), (block, self.capacity), ["view", "row"]
        else:
            shape, chunks = (views, rows, width), (block, self.capacity, width)
            dimensions = ["view", "row", "packed" if name == "topk" else "class"]
        if name != "check":
            fill = np.nan if name == "dense" else 255 if name == "dense8" else FILL
            settings |= {"dtype": DTYPES[name], "fill_value": fill}
        if name in SHARDED:
            settings["shards"], chunks = chunks, (self.recipe.repeats, *chunks[1:])
        return settings | {"shape": shape, "chunks": chunks, "dimension_names": dimensions}

    def _refuse_other_layout(self, name: str) -> None:
        """An array must be laid out as it is read: chunks are found by their place and length.

        Raises:
            PipelineError: it is not, or its description is damaged.
        """
        try:
            described = read_description(self._filesystem, f"{self._root}/{name}")
            views, *rest = described["shape"]
            settings = self._settings(name, views, rest[-1])
            chunk = described["chunk_grid"]["configuration"]["chunk_shape"]
            if tuple(described["shape"]) != settings["shape"] or views % self.recipe.block:
                raise ValueError(f"shape {described['shape']}")
            if tuple(chunk) != settings.get("shards", settings["chunks"]):
                raise ValueError(f"chunks of {chunk}")
        except Exception as error:  # of what is damaged nearly anything is raised
            raise _not_described(f"{self.path}/{name}", error) from error

    @property
    def views(self) -> int:
        """Views that the store has room for; which of their units are written is another question."""
        return self.group["argmax"].shape[0] if "argmax" in self.arrays() else 0

    def missing(self, views: int, kind: str) -> list[Unit]:
        """Units of views 0..views-1 that are not there for a kind, in the order to compute them."""
        needed = ["argmax", "check"] + [kind] * (kind != "argmax")
        written = [self._written(name) for name in needed]
        return [u for u in self.units(views) if not all((u.block, u.shard) in chunks for chunks in written)]

    def units(self, views: int) -> list[Unit]:
        """Every unit of views 0..views-1; a shard without a sample has none."""
        return [u for u in all_units(len(self.index.names), views, self.recipe) if self.index.samples[u.shard]]

    def _written(self, name: str) -> set[tuple[int, int]]:
        """(block, shard) of a kind's chunks, from one listing."""
        folder = f"{self._root}/{name}/c"
        try:
            paths = self._filesystem.find(folder) if self._filesystem.exists(folder) else []
        except IO_ERRORS as error:
            raise self._unreadable(name, error) from error
        parts = [path[len(folder) + 1 :].split("/") for path in paths]
        return {(int(p[0]), int(p[1])) for p in parts if all(part.isdigit() for part in p)}

    def _chunk_path(self, name: str, shard: int, block: int) -> str:
        return f"{self._root}/{name}/c/{block}/{shard}" + ("" if name == "argmax" else "/0")

    def read(self, shard: int, view: int, kind: str = "argmax") -> Answers:
        """A view of a shard. The returned arrays are a cache's: don't write into them.

        Raises:
            PipelineError: the unit is missing or damaged.
        """
        block, place = divmod(view, self.recipe.block)
        argmax, check = self._cached("argmax", shard, block * self.recipe.block, self._read_argmax)
        payload = None
        if kind != "argmax":
            views = self.recipe.repeats if kind in SHARDED else self.recipe.block
            first = view // views * views
            payload = self._cached(kind, shard, first, lambda *at: self._read_payload(kind, *at))[view - first]
        groups = group_count(int(self.index.samples[shard]), self.recipe.group_size)
        return Answers(argmax[place], payload, check[place, :groups])

    def read_unit(self, unit: Unit) -> np.ndarray:
        """A whole unit's argmax, uint16 (block, samples).

        Raises:
            PipelineError: the unit is missing or damaged.
        """
        return self._read_argmax(unit.shard, unit.block * self.recipe.block)[0]

    def read_check(self, unit: Unit) -> np.ndarray:
        """A unit's check, uint64 (block, slots).

        Raises:
            PipelineError: it is missing or damaged.
        """
        return self._read_chunk("check", unit.shard, unit.block * self.recipe.block)[:, 0]

    def check_unit(self, unit: Unit, kind: str) -> None:
        """Read a unit whole, past the cache.

        Raises:
            PipelineError: it is missing or damaged.
        """
        first, views = unit.block * self.recipe.block, self.recipe.repeats
        _, check = self._read_argmax(unit.shard, first)
        if kind in SHARDED:
            for view in range(first, first + self.recipe.block, views):
                self._read_payload(kind, unit.shard, view, check)
        elif kind != "argmax":
            self._read_payload(kind, unit.shard, first, check)

    def _cached(self, name: str, shard: int, first: int, read):
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
        if check is None:
            check = self._cached("argmax", shard, first // block * block, self._read_argmax)[1]
        if kind in SHARDED:
            rows = slice(shard * self.capacity, shard * self.capacity + samples)
            payload = self._fetch(kind, (slice(first, first + self.recipe.repeats), rows), shard, first)
            if len(payload) != self.recipe.repeats:
                raise self._damage(kind, shard, first, "room for fewer views: its description is damaged")
        else:
            payload = self._read_chunk(kind, shard, first)[:, :samples]
        self._compare(kind, shard, first, payload, check[first % block : first % block + len(payload)])
        return payload

    def _compare(self, name: str, shard: int, first: int, values: np.ndarray, check: np.ndarray) -> None:
        for place, number in enumerate(check[:, self.slots + KINDS.index(name)]):
            if checksum(values[place]) != number:
                raise self._damage(name, shard, first + place, "a checksum that is not the recorded one")

    def _read_chunk(self, name: str, shard: int, view: int) -> np.ndarray:
        """The chunk of a plain array that holds a view of a shard: its bytes, then their CRC-32C."""
        array = self._array(name, shard, view)
        try:
            data = self._bytes(self._chunk_path(name, shard, view // self.recipe.block))
        except FileNotFoundError:
            found = "missing: the unit was never written or was removed"
            raise self._damage(name, shard, view, found) from None
        except IO_ERRORS as error:
            raise self._unreadable(name, error) from error
        size = int(np.prod(array.chunks)) * array.dtype.itemsize
        if len(data) != size + 4:
            raise self._damage(name, shard, view, f"{len(data)} bytes instead of {size + 4}")
        if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise self._damage(name, shard, view, "bytes that do not match their CRC-32C")
        return np.frombuffer(data, array.dtype.newbyteorder("<"), size // array.dtype.itemsize).reshape(array.chunks)

    def _bytes(self, path: str) -> bytes:
        if not self._local:
            return self._filesystem.cat_file(path)
        with open(path, "rb") as file:
            return file.read()

    def _array(self, name: str, shard: int, view: int) -> zarr.Array:
        if name not in self._arrays:
            try:
                self._arrays[name] = self.group[name] if name in self.arrays() else None
            except PipelineError:
                raise
            except FileNotFoundError as error:
                raise self._damage(name, shard, view, f"no description: {error}") from error
            except IO_ERRORS as error:
                raise self._unreadable(name, error) from error
            except Exception as error:  # zarr raises nearly anything about damaged metadata
                raise self._damage(name, shard, view, f"damaged metadata: {error}") from error
        if self._arrays[name] is None:
            raise UsageError(
                f"{self.path}: no {name} in the store",
                expected=name,
                found=", ".join(self.arrays()),
                do=f"set teacher_logits.kind to {name} and run teacher-logits again",
            )
        return self._arrays[name]

    def _fetch(self, name: str, selection: tuple, shard: int, view: int) -> np.ndarray:
        try:
            return np.asarray(self._array(name, shard, view)[selection])
        except PipelineError:
            raise
        except IO_ERRORS as error:
            raise self._unreadable(name, error) from error
        except Exception as error:  # codecs raise nearly anything
            raise self._damage(name, shard, view, str(error)) from error

    def _unreadable(self, name: str, error: Exception) -> Unreadable:
        return Unreadable(
            f"{self.path}/{name}: cannot be read", found=reason(error), do="try again when the disk or server answers"
        )

    def _damage(self, name: str, shard: int, view: int, found: str) -> PipelineError:
        block = view // self.recipe.block
        return PipelineError(
            f"{self.path}/{name}: block {block} of shard {self.index.names[shard]}, view {view}",
            expected="what the teacher wrote",
            found=found,
            do="compute it again: dvc repro -f teacher-logits (or pipeline teacher-logits)",
        )


def checksum(values: np.ndarray) -> int:
    """CRC-32C of what a kind holds of one view of a shard."""
    return google_crc32c.value(np.ascontiguousarray(values).tobytes())


def opened(path: str, mode: str) -> zarr.Group:
    """A store's group.

    Raises:
        PipelineError: it is damaged or cannot be read.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        described = json.loads(filesystem.cat_file(f"{root}/zarr.json"))
        if described["attributes"]["format"] == FORMAT:  # another one is refused later, with its number
            read_description(filesystem, root)
        return zarr.open_group(path, mode=mode)
    except Exception as error:  # zarr raises nearly anything about damaged metadata
        raise _not_described(path, error) from error


def _not_described(where: str, error: Exception) -> PipelineError:
    if isinstance(error, IO_ERRORS) and not isinstance(error, FileNotFoundError):
        do = "try again when the disk or server answers"
        return Unreadable(f"{where}: cannot be read", found=reason(error), do=do)
    return PipelineError(
        f"{where}: damaged metadata",
        expected="a store of answers",
        found=f"{type(error).__name__}: {error}",
        do="move it away and compute it again: dvc repro -f teacher-logits",
    )


def exists(path: str) -> bool:
    """Whether a store is at a path or URL."""
    filesystem, root = fsspec.core.url_to_fs(path)
    return filesystem.exists(f"{root}/zarr.json")
