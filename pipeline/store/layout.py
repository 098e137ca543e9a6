"""How the zarr store of the teacher's answers is laid out: its arrays, their chunks, and which are there.

Rows are laid out shard by shard with equal capacity, in tar order. Arrays: `argmax` (view, row),
a kind's own (view, row, ...), and `check` (view, shard, slot): 64 bits a group (see
recipe.group_check), then a checksum of what each kind holds of that view of that shard.

A unit's argmax is written last, so what exists is complete (pipeline.store.writer). `argmax`, `check` and
`topk` have one chunk a unit; the dense kinds are zarr shards of one unit, with inner chunks of the views
that one visit wants (recipe.repeats).
"""

import contextlib
import importlib.metadata
import json
from typing import Any, Literal, cast

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
from pipeline.store.encoding import DTYPES, FILL, KINDS, SHARDED
from pipeline.store.metadata import read_metadata
from pipeline.views.draw import group_count

FORMAT = 2
NO_CHECK = 2**64 - 1
VERSIONS = ("numpy", "opencv-python-headless", "pillow", "timm", "torch", "torchvision", "zarr")
"""Of what draws, renders and answers: a store names those that wrote it."""


class StoreLayout:
    """Where everything of an open store lies; pipeline.store.reader.Store reads it."""

    def __init__(self, path: str, group: zarr.Group, index: Index, recipe: Recipe):
        self.path, self.group, self.index, self.recipe = path, group, index, recipe
        self.attributes = cast(dict[str, Any], group.attrs.asdict())
        self.capacity, self.classes = int(self.attributes["capacity"]), int(self.attributes["classes"])
        self.slots = max(group_count(int(samples), recipe.group_size) for samples in index.samples)
        self._filesystem, self._root = fsspec.core.url_to_fs(path)
        self._local = is_local(self._filesystem)

    @property
    def fingerprint(self) -> str:
        return self.attributes["fingerprint"]

    def _refuse_other(self, described: dict[str, Any]) -> None:
        for key, value in {"format": FORMAT, **described}.items():
            found = self.attributes.get(key)
            if found != value:
                raise UsageError(
                    f"{self.path}: the store's {key}",
                    expected=json.dumps(value),
                    found="\n            ".join([json.dumps(found), *self._differences(key, value)]),
                    do="it belongs to another experiment: name the right store, or none",
                )

    def _refuse_unsound(self) -> None:
        """Raises PipelineError where the store's figures are not those of its own index."""
        capacity = int(self.index.samples.max())
        if self.capacity != capacity or not 0 < self.classes < FILL:
            found = ValueError(f"capacity {self.capacity}, classes {self.classes}")
            raise _not_described(self.path, found)

    def _differences(self, key: str, value: Any) -> list[str]:
        """What differs, in words: `setting: the store's, the one that is asked for`."""
        attributes = self.attributes
        if key == "recipe":
            told = differences(attributes["recipe_settings"], self.recipe.model_dump(mode="json"), "recipe")
            return told or ["the settings are the same: it is of another version of the views"]
        if key == "index":
            both = (attributes["shards"], self.index.shards)
            was, now = ({shard["name"]: shard["samples"] for shard in shards} for shards in both)
            told = differences(was, now, "samples in shard")
            return told[:5] or ["as many samples in shards of the same names: images or labels are others"]
        return differences(attributes.get(key), value, key)

    def arrays(self) -> list[str]:
        """`argmax`, `check` and the kinds that the store holds."""
        names = ("check", *KINDS)
        try:
            return sorted(name for name in names if self._filesystem.exists(f"{self._root}/{name}/zarr.json"))
        except Exception as error:  # servers' clients raise nearly anything
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
        described = self.array_metadata(name)
        try:
            views, *rest = described["shape"]
            if any(type(number) is not int or number < 0 for number in described["shape"]):
                raise ValueError(f"shape {described['shape']}")
            settings = self._settings(name, views, rest[-1])
            chunk = described["chunk_grid"]["configuration"]["chunk_shape"]
            if tuple(described["shape"]) != settings["shape"] or views % self.recipe.block:
                raise ValueError(f"shape {described['shape']}")
            if tuple(chunk) != settings.get("shards", settings["chunks"]):
                raise ValueError(f"chunks of {chunk}")
        except Exception as error:
            raise _not_described(f"{self.path}/{name}", error) from error

    def array_metadata(self, name: str) -> dict[str, Any]:
        """An array's zarr.json.

        Raises:
            PipelineError: it is damaged or cannot be read.
        """
        try:
            return read_metadata(self._filesystem, f"{self._root}/{name}")
        except Exception as error:
            raise _not_described(f"{self.path}/{name}", error) from error

    @property
    def views(self) -> int:
        """Views that the store has room for; which of their units are written is another question."""
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
        """(block, shard) of a kind's chunks, from one listing."""
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
    """A store's group.

    Raises:
        PipelineError: it is damaged or cannot be read.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        described = json.loads(filesystem.cat_file(f"{root}/zarr.json"))
        if described["attributes"]["format"] == FORMAT:  # another one is refused later, with its number
            _check_types(read_metadata(filesystem, root)["attributes"])
        return zarr.open_group(path, mode=mode)
    except Exception as error:
        raise _not_described(path, error) from error


TYPES = {
    "fingerprint": str, "index": str, "recipe": str, "recipe_settings": dict, "teacher": dict, "precision": str,
    "classes": int, "capacity": int, "shards": list, "versions": dict,
}  # fmt: skip


def _check_types(attributes: dict[str, Any]) -> None:
    """Raises ValueError where a store's attributes are not of the types that they are written with."""
    for key, kind in TYPES.items():
        if type(attributes.get(key)) is not kind:
            raise ValueError(f"{key}: {str(attributes.get(key))[:100]}")
    for shard in attributes["shards"]:
        if not isinstance(shard, dict) or type(shard.get("name")) is not str or type(shard.get("samples")) is not int:
            raise ValueError(f"shards: {str(shard)[:100]}")


DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, FileNotFoundError)
"""What reading something damaged raises; all else tells of the machine or the server."""


def _not_described(where: str, error: Exception) -> PipelineError:
    if not isinstance(error, DAMAGE):
        return unreadable(where, error)
    return PipelineError(
        f"{where}: damaged metadata",
        expected="a store of answers",
        found=f"{type(error).__name__}: {error}",
        do="move it away and compute it again: dvc repro -f teacher-logits",
    )


def store_exists(path: str) -> bool:
    """Whether a store is at a path or URL.

    Raises:
        Unreadable: a server does not answer, or the library of a URL's scheme is not installed.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        filesystem.cat_file(f"{root}/zarr.json")  # to ask for its existence takes any error for an absence
    except (FileNotFoundError, NotADirectoryError):
        return False
    except Exception as error:
        raise unreadable(path, error) from error
    return True


def library_versions() -> dict[str, str]:
    """Of what draws, renders and answers."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
