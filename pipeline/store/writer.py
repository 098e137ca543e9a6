"""Writing a store: create it, commit units, remove units.

One process writes a unit, by rename: check, payload, argmax. So a unit that has an argmax and a kind's payload is complete
for that kind, also where the payload was added to an earlier argmax.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self, cast

import numpy as np
import zarr

from pipeline.batches.plan import Unit
from pipeline.common.errors import Damaged, PipelineError, UsageError, is_io_error, unwritable
from pipeline.common.lease import possibly_held
from pipeline.common.versions import library_versions
from pipeline.shards.index import Index
from pipeline.store.kinds import payload_width
from pipeline.store.layout import FORMAT, NO_CHECK, open_group, store_exists
from pipeline.store.metadata import create_array, create_group
from pipeline.store.reader import Store, StoreIdentity, checksum


class StoreWriter(Store):
    """A store open for writing; create it with `StoreWriter.create`."""

    @classmethod
    def create(
        cls,
        path: str,
        identity: StoreIdentity,
        index: Index,
        views: int,
        kind: str,
        k: int,
        precision: str,
        versions: dict[str, str] | None = None,
    ) -> Self:
        """Open for writing; create the group, the arrays of a kind and room for more views where they are missing.

        Args:
            versions: of the libraries that compute the predictions; None: those installed.

        Raises:
            UsageError: the store at `path` has a different identity, precision or k.
            PipelineError: it is damaged or cannot be written.
        """
        capacity, classes = int(index.samples.max()), len(index.classes)
        if not store_exists(path):
            with _writing(path):
                attributes = {
                    "format": FORMAT,
                    "fingerprint": identity.fingerprint,
                    **identity.as_dict(),
                    "recipe_settings": identity.recipe.model_dump(mode="json"),
                    "precision": precision,
                    "classes": classes,
                    "capacity": capacity,
                    "shards": [{"name": s["name"], "samples": s["samples"]} for s in index.shards],
                    "versions": versions or library_versions(),
                }
                create_group(path, attributes)
        group = open_group(path, "r+")
        store = cls(path, group, index, identity.recipe)
        store._check_attributes({"sampling": identity.sampling, **identity.as_dict()})
        if group.attrs["precision"] != precision:
            raise UsageError(
                f"{path}: the store's precision",
                expected=str(group.attrs["precision"]),
                found=f"teacher_logits.precision {precision}",
                do="a store has one precision: set the key back, or remove the store",
            )
        with _writing(path):
            store._create_arrays(views, kind, k)
        return store

    @classmethod
    def open_complete(
        cls, path: str, identity: StoreIdentity, index: Index, views: int, kind: str, k: int, precision: str
    ) -> Store | None:
        """Open the store that `create` would open, but for reading (its disk may be read-only); None if it is incomplete."""
        if not store_exists(path):
            return None
        store = Store.open(path, index, identity.recipe)
        store._check_attributes({"sampling": identity.sampling, **identity.as_dict()})
        width = payload_width(kind, store.classes, k)
        same = store.attributes["precision"] == precision and kind in store.arrays()
        same = same and (kind == "argmax" or store.array_metadata(kind)["shape"][-1] == width)
        return store if same and not store.missing(views, kind) else None

    def _create_arrays(self, views: int, kind: str, k: int) -> None:
        for name in {"argmax": 0, "check": 0, kind: 0}:
            settings = self.dimensions.array(name, views, payload_width(kind, self.classes, k))
            if name not in self.arrays():
                create_array(self.group, name, settings)
            self._check_array(name)
            array, shape = self._array(name), settings["shape"]
            if array.shape[2:] != shape[2:] and not self._written(name):  # created for another width, never written
                self._filesystem.rm_file(f"{self._root}/{name}/zarr.json")
                create_array(self.group, name, settings)
                array = self._array(name)
            if array.shape[2:] != shape[2:]:
                raise UsageError(
                    f"{self.path}/{name}",
                    expected=f"width {array.shape[2]} as stored",
                    found=f"width {shape[2]} as configured",
                    do="set teacher_logits.top_k back",
                )
            if array.shape[0] < shape[0]:
                array.resize(shape)

    def _array(self, name: str) -> zarr.Array:
        return cast(zarr.Array, self.group[name])

    def write_unit(self, unit: Unit, buffers: dict[str, np.ndarray], checks: np.ndarray) -> None:
        """Commit the predictions for a unit, argmax last.

        If the same argmax is there already, for another kind, it is left in place: the unit can be read meanwhile.

        Args:
            buffers: `argmax`, uint16 (block, samples), and the payload of a kind, (block, samples, width).
            checks: group checks, uint64 (block, groups).

        Raises:
            PipelineError: the disk is full or the store cannot be written.
        """
        block, samples = self.recipe.block, int(self.index.samples[unit.shard])
        views = slice(unit.block * block, (unit.block + 1) * block)
        rows = slice(unit.shard * self.capacity, (unit.shard + 1) * self.capacity)
        with _writing(self.path):
            check = self._current_check(unit, checks)
            written = [name for name in buffers if name != "argmax"]
            if not self.has_argmax(unit, buffers["argmax"]):
                written.append("argmax")
            self.remove_unit(unit, tuple(reversed(written)))
            check[:, : checks.shape[1]] = checks
            padded = {}
            for name in buffers:
                array = self._array(name)
                padded[name] = np.full((block, self.capacity, *array.shape[2:]), array.fill_value, array.dtype)
                padded[name][:, :samples] = buffers[name]
                check[:, self.checksum_slot(name)] = [checksum(view) for view in padded[name][:, :samples]]
            # first, so that a payload next to an earlier argmax is never there without its checksum
            self._array("check")[views, unit.shard] = check
            self._sync(unit, "check")
            for name in written:
                self._array(name)[views, rows] = padded[name]
                self._sync(unit, name)

    def has_argmax(self, unit: Unit, argmax: np.ndarray | None = None) -> bool:
        """Whether the unit has a valid argmax, and if one is given, this one."""
        try:
            stored = self.read_unit(unit)
        except Damaged:
            return False
        return argmax is None or np.array_equal(stored, argmax)

    def add_kind(self, unit: Unit, buffers: dict[str, np.ndarray], checks: np.ndarray) -> None:
        """Commit the predictions for a unit as `write_unit`, but keep an argmax that is there already, for another kind.

        Runs and manifests depend on it, and a teacher on another machine may round differently.

        Raises:
            PipelineError: as `write_unit`, or the pictures are not those that the argmax is for.
        """
        with contextlib.suppress(Damaged):  # there is none
            argmax, check = self._read_argmax(unit.shard, unit.block * self.recipe.block)
            if not np.array_equal(check[:, : checks.shape[1]], checks):
                versions = ", ".join(f"{name} {version}" for name, version in self.attributes["versions"].items())
                raise PipelineError(
                    f"{self.path}: block {unit.block} of shard {self.index.names[unit.shard]}",
                    expected="the pictures that its predictions are for",
                    found="other pictures: rendered differently on this machine",
                    do=f"use the versions that it was computed with ({versions}), or remove the store",
                )
            buffers = {**buffers, "argmax": argmax}
        self.write_unit(unit, buffers, checks)

    def _sync(self, unit: Unit, name: str) -> None:
        """Flush a chunk and its folder to disk, so that the order of writing holds even after a power cut."""
        if self._local:
            chunk = Path(self._chunk_path(name, unit.shard, unit.block))
            for path in (chunk, chunk.parent):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def _current_check(self, unit: Unit, checks: np.ndarray) -> np.ndarray:
        """The unit's check as stored, whose checksums of other kinds stay, if it is for the pictures of these group checks."""
        with contextlib.suppress(Damaged):
            stored = np.array(self.read_check(unit))
            if np.array_equal(stored[:, : checks.shape[1]], checks):
                return stored
        # never written, damaged, or for other pictures: what is stored of the unit belongs to those, or cannot be verified
        self.remove_unit(unit, tuple(name for name in self.kinds if name in self.arrays()))
        return np.full((self.recipe.block, self.groups + len(self.kinds)), NO_CHECK, np.uint64)

    def remove_unit(self, unit: Unit, names: tuple[str, ...] = ("argmax",)) -> None:
        """Delete chunks of a unit, in this order; without its argmax a unit is missing for every kind."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a listing may be out of date, so none is consulted
                self._filesystem.rm_file(self._chunk_path(name, unit.shard, unit.block))
        self._cache.clear()


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """Write chunks even where they equal the fill value; turn I/O errors into a PipelineError."""
    try:
        with zarr.config.set({"array.write_empty_chunks": True}):
            yield
    except Exception as error:
        if not is_io_error(error):
            raise
        raise unwritable(f"{path}: the store", error) from error


def sweep_store(path: str, own: str = "") -> None:
    """Remove the temporary files that killed writers left in and next to a store, unless another writer may be active.

    Args:
        own: the lock that the caller itself holds.
    """
    place = Path(path)
    # listed before the locks are checked: a writer holds its lease before its first file
    partials = [*place.rglob("*.partial"), *place.parent.glob(f"{place.name}.part-*.partial")]
    if partials and not {Path(lock).name for lock in possibly_held(path)} - {Path(own).name}:
        for partial in partials:
            if not (own and partial.name.startswith(f"{Path(own).name}.")):
                with contextlib.suppress(OSError):  # the disk may have become read-only
                    partial.unlink(missing_ok=True)
