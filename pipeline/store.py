"""The zarr store of the teacher's answers: create, write a unit, read a view of a shard, verify.

Rows are laid out shard by shard with equal capacity, in tar order. Arrays: `argmax` (view, row),
`topk` or `dense` (view, row, ...), and `check` (view, shard, slot): 64 bits a group (see
recipe.group_check), then a checksum of what each kind holds of that view of that shard.

One process writes a unit, by rename, argmax last, so what exists is complete. zarr reads a missing
chunk as the fill value, silently; here that is an error.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pipeline.answers import FILL, KINDS, payload_width
from pipeline.config import Recipe
from pipeline.errors import PipelineError, UsageError
from pipeline.files import replacing
from pipeline.plan import Unit, all_units
from pipeline.recipe import group_count, recipe_fingerprint
from pipeline.shards import Index
from pipeline.strict import fingerprint

FORMAT = 1
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
    """An open store. Use `Store.create` to write, `Store.open` to read."""

    def __init__(self, path: str, group: zarr.Group, index: Index, recipe: Recipe):
        self.path, self.group, self.index, self.recipe = path, group, index, recipe
        self.capacity = int(group.attrs["capacity"])
        self.classes = int(group.attrs["classes"])
        self.slots = max(group_count(int(samples), recipe.group_size) for samples in index.samples)
        self._cache: OrderedDict[tuple[int, int, str], Answers] = OrderedDict()

    @classmethod
    def create(
        cls, path: str, identity: Identity, index: Index, views: int, kind: str, top_k: int, precision: str
    ) -> "Store":
        """Open for writing; make the group, a kind's array or room for more views where they lack.

        Raises:
            UsageError: the store at `path` is of another identity, precision or k.
        """
        capacity, classes = int(index.samples.max()), len(index.classes)
        store = None
        with _writing(path):
            if not _exists(path):
                attributes = {
                    "format": FORMAT,
                    "fingerprint": identity.fingerprint,
                    **identity.described(),
                    "recipe_settings": identity.recipe.model_dump(mode="json"),
                    "precision": precision,
                    "classes": classes,
                    "capacity": capacity,
                    "shards": [{"name": s["name"], "samples": s["samples"]} for s in index.shards],
                    "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
                }
                zarr.create_group(path, attributes=attributes)
            group = _opened(path, "r+")
            store = cls(path, group, index, identity.recipe)
            store._refuse_other(identity.described())
            if group.attrs["precision"] != precision:
                raise UsageError(
                    f"{path}: the store's precision",
                    expected=str(group.attrs["precision"]),
                    found=f"teacher_logits.precision {precision}",
                    do="keep one precision a store: set the key back, or remove the store",
                )
            store._make_arrays(views, kind, top_k)
        return store

    @classmethod
    def open(cls, path: str, index: Index, recipe: Recipe) -> "Store":
        """Open for reading.

        Raises:
            PipelineError: no store at `path`.
            UsageError: it is of another format, index or recipe.
        """
        if not _exists(path):
            raise PipelineError(
                f"{path}: no store",
                expected="the teacher's answers for this recipe, index and teacher",
                found="nothing",
                do="compute it: dvc repro -f teacher-logits (or pipeline teacher-logits)",
            )
        store = cls(path, _opened(path, "r"), index, recipe)
        store._refuse_other({"index": index.fingerprint, "recipe": recipe_fingerprint(recipe)})
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

    def _make_arrays(self, views: int, kind: str, top_k: int) -> None:
        block, shards = self.recipe.block, len(self.index.names)
        rows, slots = shards * self.capacity, self.slots + len(KINDS)
        self._make_array("argmax", (views, rows), np.uint16, (block, self.capacity), ["view", "row"], FILL)
        self._make_array(
            "check", (views, shards, slots), np.uint64, (block, 1, slots), ["view", "shard", "slot"], NO_CHECK
        )
        if kind == "argmax":
            return
        width = payload_width(kind, self.classes, top_k)
        whole, shape = (block, self.capacity, width), (views, rows, width)
        if kind == "topk":
            self._make_array("topk", shape, np.uint16, whole, ["view", "row", "packed"], FILL)
        else:
            inner = (self.recipe.repeats, self.capacity, width)
            self._make_array("dense", shape, np.float16, inner, ["view", "row", "class"], np.nan, whole)

    def _make_array(self, name, shape, dtype, chunks, dimensions, fill, shards=None) -> None:
        if name not in self.group:
            self.group.create_array(
                name,
                shape=shape,
                chunks=chunks,
                shards=shards,
                dtype=dtype,
                compressors=[Crc32cCodec()],  # zarr's default codecs let bit flips through
                fill_value=fill,
                dimension_names=dimensions,
            )
        array = self.group[name]
        if array.shape[2:] != shape[2:]:
            raise UsageError(
                f"{self.path}/{name}",
                expected=f"width {array.shape[2]} as stored",
                found=f"{shape[2]} asked for",
                do="set teacher_logits.top_k back",
            )
        if array.shape[0] < shape[0]:
            array.resize(shape)

    @property
    def views(self) -> int:
        """Views that the store has room for; which of their units are written is another question."""
        return self.group["argmax"].shape[0] if "argmax" in self.group else 0

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
        filesystem, root = fsspec.core.url_to_fs(self.path)
        folder = f"{root}/{name}/c"
        paths = filesystem.find(folder) if filesystem.exists(folder) else []
        parts = [path[len(folder) + 1 :].split("/") for path in paths]
        return {(int(p[0]), int(p[1])) for p in parts if all(part.isdigit() for part in p)}

    def write_unit(self, unit: Unit, buffers: dict[str, np.ndarray], checks: np.ndarray) -> None:
        """Commit what the teacher said about a unit; argmax last.

        Args:
            buffers: `argmax` uint16 (block, samples) and a kind's payload (block, samples, width).
            checks: uint64 (block, groups).

        Raises:
            PipelineError: the disk is full or the store cannot be written.
        """
        block, samples = self.recipe.block, int(self.index.samples[unit.shard])
        views = slice(unit.block * block, (unit.block + 1) * block)
        rows = slice(unit.shard * self.capacity, (unit.shard + 1) * self.capacity)
        with _writing(self.path):
            slots = self._other_slots(unit)
            self.remove_unit(unit, ("argmax", *buffers))
            slots[:, : checks.shape[1]] = checks
            for name in sorted(buffers, key=lambda name: name == "argmax"):
                array = self.group[name]
                whole = np.full((block, self.capacity, *array.shape[2:]), array.fill_value, array.dtype)
                whole[:, :samples] = buffers[name]
                slots[:, self.slots + KINDS.index(name)] = [_checksum(view) for view in whole[:, :samples]]
                if name == "argmax":
                    self.group["check"][views, unit.shard] = slots
                array[views, rows] = whole

    def _other_slots(self, unit: Unit) -> np.ndarray:
        """The unit's check as it is, for the checksums of kinds that are not written now."""
        block = self.recipe.block
        try:
            return np.array(self.group["check"][unit.block * block : (unit.block + 1) * block, unit.shard])
        except (ValueError, OSError, RuntimeError):
            # damaged: without their checksums the other kinds' answers are lost too
            self.remove_unit(unit, tuple(name for name in KINDS if name in self.group))
            return np.full((block, self.slots + len(KINDS)), NO_CHECK, np.uint64)

    def remove_unit(self, unit: Unit, names: tuple[str, ...] = ("argmax",)) -> None:
        """Take a unit back: delete chunks of it, its argmax first, which says that it is complete."""
        filesystem, root = fsspec.core.url_to_fs(self.path)
        for name in names:
            dimensions = len(self.group[name].shape) - 2
            path = f"{root}/{name}/c/{unit.block}/{unit.shard}" + "/0" * dimensions
            if filesystem.exists(path):
                filesystem.rm(path)

    def read(self, shard: int, view: int, kind: str = "argmax") -> Answers:
        """A view of a shard. The returned arrays are a cache's: don't write into them.

        Raises:
            PipelineError: the unit is missing or damaged.
        """
        key = (shard, view, kind)
        if key not in self._cache:
            self._cache[key] = self._read(*key)
            if len(self._cache) > self.cache_entries:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    cache_entries = 256

    def _read(self, shard: int, view: int, kind: str) -> Answers:
        samples = int(self.index.samples[shard])
        rows = slice(shard * self.capacity, shard * self.capacity + samples)
        slots = self._fetch("check", (view, shard), shard, view)
        argmax = self._fetch("argmax", (view, rows), shard, view)
        payload = None if kind == "argmax" else self._fetch(kind, (view, rows), shard, view)
        if (argmax == FILL).any():
            raise self._damage("argmax", shard, view, "missing: the unit was never written or was removed")
        for name, values in (("argmax", argmax), (kind, payload if kind != "argmax" else argmax)):
            if slots[self.slots + KINDS.index(name)] != _checksum(values):
                raise self._damage(name, shard, view, "a checksum that is not the recorded one")
        return Answers(argmax, payload, slots[: group_count(samples, self.recipe.group_size)])

    def read_unit(self, unit: Unit) -> np.ndarray:
        """A whole unit's argmax, uint16 (block, samples).

        Raises:
            PipelineError: the unit is missing or damaged.
        """
        first, samples = unit.block * self.recipe.block, int(self.index.samples[unit.shard])
        views = slice(first, first + self.recipe.block)
        rows = slice(unit.shard * self.capacity, unit.shard * self.capacity + samples)
        slots = self._fetch("check", (views, unit.shard), unit.shard, first)
        argmax = self._fetch("argmax", (views, rows), unit.shard, first)
        recorded = slots[:, self.slots + KINDS.index("argmax")]
        if any(_checksum(view) != number for view, number in zip(argmax, recorded, strict=True)):
            raise self._damage("argmax", unit.shard, first, "a checksum that is not the recorded one")
        return argmax

    def _fetch(self, name: str, selection: tuple, shard: int, view: int) -> np.ndarray:
        try:
            array = self.group[name] if name in self.group else None
        except Exception as error:  # zarr raises nearly anything about damaged metadata
            raise self._damage(name, shard, view, f"damaged metadata: {error}") from error
        if array is None:
            raise UsageError(
                f"{self.path}: no {name} in the store",
                expected=name,
                found=", ".join(sorted(self.group.array_keys())),
                do=f"set teacher_logits.kind to {name} and run teacher-logits again",
            )
        try:
            return np.asarray(array[selection])
        except Exception as error:  # codecs, too, raise nearly anything
            raise self._damage(name, shard, view, str(error)) from error

    def _damage(self, name: str, shard: int, view: int, found: str) -> PipelineError:
        block = view // self.recipe.block
        return PipelineError(
            f"{self.path}/{name}: block {block} of shard {self.index.names[shard]}, view {view}",
            expected="what the teacher wrote",
            found=found,
            do="compute it again: dvc repro -f teacher-logits (or pipeline teacher-logits)",
        )

    def damaged(self, views: int, kind: str) -> list[tuple[Unit, str]]:
        """Read everything; the units that are missing or damaged, each with what was found."""
        found = []
        for unit in self.units(views):
            try:
                for view in range(unit.block * self.recipe.block, (unit.block + 1) * self.recipe.block):
                    self._read(unit.shard, view, kind)
            except PipelineError as error:
                found.append((unit, str(error)))
        return found

    def manifest(self, views: int, kind: str) -> dict[str, Any]:
        """A small JSON that stands for a complete store: what it is, and a digest of every unit.

        Deterministic: no times, no paths. Raises PipelineError naming the missing units.
        """
        missing = self.missing(views, kind)
        if missing:
            raise PipelineError(
                f"{self.path}: incomplete",
                expected=f"{views} views of {len(self.index.names)} shards as {kind}",
                found=f"{len(missing)} units missing, the first: shard {missing[0].shard}, block {missing[0].block}",
                do="run teacher-logits again: it goes on where it was",
            )
        digests: dict[str, list[str]] = {}
        # the groups' checks and what this kind consists of: another kind beside it changes nothing
        chosen = [*range(self.slots), *(self.slots + KINDS.index(name) for name in sorted({"argmax", kind}))]
        for block in range(views // self.recipe.block):
            slots = self.group["check"][block * self.recipe.block : (block + 1) * self.recipe.block]
            for shard, name in enumerate(self.index.names):
                digest = hashlib.blake2b(np.ascontiguousarray(slots[:, shard, chosen]), digest_size=8).hexdigest()
                digests.setdefault(name, []).append(digest)
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "kind": kind,
            "views": views,
            "rows": len(self.index),
            "units": digests,
        }


def _checksum(values: np.ndarray) -> int:
    return google_crc32c.value(np.ascontiguousarray(values).tobytes())


def _opened(path: str, mode: str) -> zarr.Group:
    try:
        group = zarr.open_group(path, mode=mode)
        group.attrs["fingerprint"], int(group.attrs["capacity"]), int(group.attrs["classes"])
        dict(group.arrays())
        return group
    except OSError:
        raise
    except Exception as error:  # zarr raises nearly anything about damaged metadata
        raise PipelineError(
            f"{path}: damaged metadata",
            expected="a store of answers",
            found=f"{type(error).__name__}: {error}",
            do="move it away and compute it again: dvc repro -f teacher-logits",
        ) from error


def _exists(path: str) -> bool:
    filesystem, root = fsspec.core.url_to_fs(path)
    return filesystem.exists(f"{root}/zarr.json")


@contextlib.contextmanager
def _writing(path: str):
    """Write chunks even where they equal the fill value; tell a full disk plainly."""
    try:
        with zarr.config.set({"array.write_empty_chunks": True}):
            yield
    except OSError as error:
        raise PipelineError(
            f"{path}: the store cannot be written",
            found=error.strerror or str(error),
            do="make room or correct the permissions, then run the same command again: it goes on",
        ) from error


def store_bytes(path: str) -> int:
    """Bytes on disk of everything below a store."""
    filesystem, root = fsspec.core.url_to_fs(path)
    return sum(info["size"] for info in filesystem.find(root, detail=True).values())


def sweep(path: str) -> None:
    """Remove the temporary files that killed writers of a local store left."""
    for partial in Path(path).rglob("*.partial"):
        partial.unlink(missing_ok=True)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """A complete store's manifest. Raises PipelineError where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(f"{path}: no store is complete", do="run: pipeline teacher-logits") from None
    except ValueError as error:
        raise PipelineError(f"{path}: damaged", found=str(error), do="run: pipeline teacher-logits") from error
