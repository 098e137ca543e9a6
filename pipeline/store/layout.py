"""The layout of a store: its arrays and chunks, which units it holds, and its metadata.

The rows of a shard follow one another in tar order, and every shard takes up `capacity` rows. Arrays: `argmax`
(view, row); a kind's own (view, row, ...); and `check` (view, shard, slot): 64 bits per group (batch.group_check),
then for each kind that the store may hold a checksum of what it holds for that view of that shard. Logits of every
kind share a store; classes that were drawn from them have a store of their own, since the draws are part of its
identity.

A unit that has an argmax and a kind's chunk is complete for that kind (pipeline.store.writer). `argmax`, `check`, `topk`
and `sampled` have one chunk per unit. For the dense kinds a unit is a zarr shard whose inner chunks hold the views that
training reads together (recipe.repeats).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import fsspec
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pipeline.batches.plan import Unit, all_units
from pipeline.common.errors import PipelineError, Unreadable, UsageError, unreadable
from pipeline.common.files import is_local
from pipeline.config.schema import Recipe
from pipeline.config.validation import differences
from pipeline.shards.index import Index
from pipeline.store.kinds import KINDS, NO_CLASS
from pipeline.store.metadata import read_metadata
from pipeline.views.draw import group_count

FORMAT = 2
NO_CHECK = 2**64 - 1
MAKE_STORE = "pipeline teacher-logits (--for finetune: the second store)"
"""What computes a store or resumes it, for messages about one whose purpose is not known."""


@dataclass(frozen=True)
class Dimensions:
    """What the shapes of a store's arrays follow from."""

    recipe: Recipe
    shards: int
    capacity: int
    """Rows per shard."""
    groups: int
    """Groups per shard, at most."""
    kinds: tuple[str, ...]
    """The kinds that the store may hold, in the order of their checksums."""

    @classmethod
    def of(cls, recipe: Recipe, samples: Iterable[int], sampled: bool) -> Self:
        """The dimensions for shards with these numbers of samples.

        Args:
            sampled: whether the store is one of drawn classes.
        """
        counts = [int(count) for count in samples]
        groups = max(group_count(count, recipe.group_size) for count in counts)
        kinds = ("argmax", "sampled") if sampled else tuple(kind for kind in KINDS if kind != "sampled")
        return cls(recipe, len(counts), max(counts), groups, kinds)

    def array(self, name: str, views: int, width: int) -> dict[str, Any]:
        """Arguments of zarr.create_array: shape, chunks, codecs, dimension names."""
        block, rows, slots = self.recipe.block, self.shards * self.capacity, self.groups + len(self.kinds)
        # zarr's default codecs do not detect flipped bits
        settings: dict[str, Any] = {"compressors": [Crc32cCodec()], "dtype": np.uint64, "fill_value": NO_CHECK}
        if name == "check":
            shape, chunks, names = (views, self.shards, slots), (block, 1, slots), ["view", "shard", "slot"]
        elif name == "argmax":
            shape, chunks, names = (views, rows), (block, self.capacity), ["view", "row"]
        else:
            shape, chunks = (views, rows, width), (block, self.capacity, width)
            names = ["view", "row", KINDS[name].axis]
        if name in KINDS:
            settings |= {"dtype": KINDS[name].dtype, "fill_value": KINDS[name].fill}
        if name in KINDS and KINDS[name].sharded:
            settings["shards"], chunks = chunks, (self.recipe.repeats, *chunks[1:])
        return settings | {"shape": shape, "chunks": chunks, "dimension_names": names}

    def file_bytes(self, name: str, width: int) -> int:
        """Bytes of the file that holds a unit of an array."""
        settings = self.array(name, self.recipe.block, width)
        chunk = math.prod(settings["chunks"]) * np.dtype(settings["dtype"]).itemsize + 4  # with its CRC-32C
        if "shards" not in settings:
            return chunk
        count = self.recipe.block // self.recipe.repeats
        return count * (chunk + 16) + 4  # an index of 2 x uint64 per inner chunk, with its CRC-32C, ends a zarr shard


class StoreLayout:
    """The arrays, files and metadata of an open store; pipeline.store.reader.Store reads the chunks."""

    def __init__(self, path: str, group: zarr.Group, index: Index, recipe: Recipe):
        self.path, self.group, self.index, self.recipe = path, group, index, recipe
        self.attributes = cast(dict[str, Any], group.attrs.asdict())
        self.dimensions = Dimensions.of(recipe, index.samples, self.attributes.get("sampling") is not None)
        self.capacity, self.groups, self.kinds = self.dimensions.capacity, self.dimensions.groups, self.dimensions.kinds
        self.classes = int(self.attributes["classes"])
        self._filesystem, self._root = fsspec.core.url_to_fs(path)
        self._local = is_local(self._filesystem)

    @property
    def fingerprint(self) -> str:
        return self.attributes["fingerprint"]

    def _check_attributes(self, expected: dict[str, Any]) -> None:
        """Raises UsageError where attributes differ from the expected ones, PipelineError where they are invalid."""
        for key, value in {"format": FORMAT, **expected}.items():
            found = self.attributes.get(key)
            if found != value:
                raise UsageError(
                    f"{self.path}: the store's {key}",
                    expected=json.dumps(value),
                    found="\n            ".join([json.dumps(found), *self._differences(key, value)]),
                    do=f"run: {MAKE_STORE}, which makes one for this configuration; or undo the change, or name another store",
                )
        capacity = int(self.attributes["capacity"])
        if capacity != self.capacity or not 0 < self.classes < NO_CLASS:
            error = ValueError(f"capacity {capacity}, classes {self.classes}")
            raise _damaged_metadata(self.path, error)

    def checksum_slot(self, kind: str) -> int:
        """The slot of `check` with the checksum of a kind."""
        return self.groups + self.kinds.index(kind)

    def _differences(self, key: str, value: Any) -> list[str]:
        """How an attribute differs, in words."""
        attributes = self.attributes
        if key == "recipe":
            found = differences(attributes["recipe_settings"], self.recipe.model_dump(mode="json"), "recipe")
            named = [f"{line} (the store's, the configuration's)" for line in found]
            return named or ["the settings are the same, but not the version of the views"]
        if key == "index":
            both = (attributes["shards"], self.index.shards)
            was, now = ({shard["name"]: shard["samples"] for shard in shards} for shards in both)
            found = differences(was, now, "samples in shard")
            return found[:5] or ["shards have the same names and numbers of samples, but other images or labels"]
        return differences(attributes.get(key), value, key)

    def arrays(self) -> list[str]:
        """The arrays that exist: `argmax`, `check` and those of kinds."""
        names = ("check", *self.kinds)
        try:
            return sorted(name for name in names if self._filesystem.exists(f"{self._root}/{name}/zarr.json"))
        except Exception as error:  # servers' clients raise nearly anything
            raise self._unreadable("", error) from error

    def _check_array(self, name: str) -> None:
        """Check that an array has the layout that the reader assumes, which finds chunks by place and length.

        Raises:
            PipelineError: it has a different layout, or its metadata is damaged.
        """
        metadata = self.array_metadata(name)
        try:
            views, *rest = metadata["shape"]
            if any(type(number) is not int or number < 0 for number in metadata["shape"]):
                raise ValueError(f"shape {metadata['shape']}")
            settings = self.dimensions.array(name, views, rest[-1])
            chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            if tuple(metadata["shape"]) != settings["shape"] or views % self.recipe.block:
                raise ValueError(f"shape {metadata['shape']}")
            if tuple(chunk) != settings.get("shards", settings["chunks"]):
                raise ValueError(f"chunks of {chunk}")
        except Exception as error:
            raise _damaged_metadata(f"{self.path}/{name}", error) from error

    def array_metadata(self, name: str) -> dict[str, Any]:
        """An array's parsed zarr.json.

        Raises:
            PipelineError: it is damaged or cannot be read.
        """
        try:
            return read_metadata(self._filesystem, f"{self._root}/{name}")
        except Exception as error:
            raise _damaged_metadata(f"{self.path}/{name}", error) from error

    @property
    def views(self) -> int:
        """Views that the store has room for, whether or not their units are written."""
        return self.array_metadata("argmax")["shape"][0] if "argmax" in self.arrays() else 0

    def missing(self, views: int, kind: str) -> list[Unit]:
        """Units of views 0..views-1 that are not there for a kind, in the order to compute them."""
        needed = ["argmax", "check"] + [kind] * (kind != "argmax")
        written = [self._written(name) for name in needed]
        return [u for u in self.units(views) if not all((u.block, u.shard) in chunks for chunks in written)]

    def units(self, views: int) -> list[Unit]:
        """Every unit of views 0..views-1; a shard without a sample has none."""
        return [u for u in all_units(len(self.index.names), views, self.recipe) if self.index.samples[u.shard]]

    def _written(self, name: str) -> set[tuple[int, int]]:
        """(block, shard) of an array's chunks, from one listing."""
        folder = f"{self._root}/{name}/c"
        try:
            paths = self._filesystem.find(folder) if self._filesystem.exists(folder) else []
        except Exception as error:  # servers' clients raise nearly anything
            raise self._unreadable(name, error) from error
        parts = [path[len(folder) + 1 :].split("/") for path in paths]
        return {(int(p[0]), int(p[1])) for p in parts if len(p) > 1 and all(part.isdigit() for part in p)}

    def _chunk_path(self, name: str, shard: int, block: int) -> str:
        return f"{self._root}/{name}/c/{block}/{shard}" + ("" if name == "argmax" else "/0")

    def _unreadable(self, name: str, error: Exception) -> Unreadable:
        return unreadable(f"{self.path}/{name}", error)


def open_group(path: str, mode: Literal["r", "r+"]) -> zarr.Group:
    """Open a store's zarr group.

    Raises:
        PipelineError: it is damaged or cannot be read.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        metadata = json.loads(filesystem.cat_file(f"{root}/zarr.json"))
        if metadata["attributes"]["format"] == FORMAT:  # another format is refused later, with its number
            _check_types(read_metadata(filesystem, root)["attributes"])
        return zarr.open_group(path, mode=mode)
    except Exception as error:
        raise _damaged_metadata(path, error) from error


ATTRIBUTE_TYPES = {
    "fingerprint": str, "index": str, "recipe": str, "recipe_settings": dict, "teacher": dict, "precision": str,
    "classes": int, "capacity": int, "shards": list, "versions": dict,
}  # fmt: skip


def _check_types(attributes: dict[str, Any]) -> None:
    """Raises ValueError where a store's attributes have types other than those written."""
    for key, kind in ATTRIBUTE_TYPES.items():
        if type(attributes.get(key)) is not kind:
            raise ValueError(f"{key}: {str(attributes.get(key))[:100]}")
    for shard in attributes["shards"]:
        if not isinstance(shard, dict) or type(shard.get("name")) is not str or type(shard.get("samples")) is not int:
            raise ValueError(f"shards: {str(shard)[:100]}")


DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, FileNotFoundError)
"""Raised by reading something damaged; any other error comes from the machine or the server."""


def _damaged_metadata(where: str, error: Exception) -> PipelineError:
    if not isinstance(error, DAMAGE):
        return unreadable(where, error)
    return PipelineError(
        f"{where}: damaged metadata",
        expected="a store of teacher predictions",
        found=f"{type(error).__name__}: {error}",
        do=f"move it away and compute it again: {MAKE_STORE}",
    )


def store_exists(path: str) -> bool:
    """Whether there is a store at a path or URL.

    Raises:
        Unreadable: a server does not answer, or the library for a URL's scheme is not installed.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        filesystem.cat_file(f"{root}/zarr.json")  # `exists` would take any error for absence
    except (FileNotFoundError, NotADirectoryError):
        return False
    except Exception as error:
        raise unreadable(path, error) from error
    return True
