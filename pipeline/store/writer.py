"""Writing the store of the teacher's answers: create it, commit a unit, take one back.

One process writes a unit, by rename, argmax last, so what exists is complete.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self, cast

import numpy as np
import zarr

from pipeline.batches.plan import Unit
from pipeline.common.errors import Damaged, UsageError, is_io_error, unwritable
from pipeline.common.lease import possibly_held
from pipeline.shards.index import Index
from pipeline.store.encoding import KINDS, payload_width
from pipeline.store.layout import FORMAT, NO_CHECK, library_versions, open_group, store_exists
from pipeline.store.metadata import create_array, create_group
from pipeline.store.reader import Store, StoreIdentity, checksum


class StoreWriter(Store):
    """A store that can be written: `StoreWriter.create`."""

    @classmethod
    def create(
        cls, path: str, identity: StoreIdentity, index: Index, views: int, kind: str, top_k: int, precision: str
    ) -> Self:
        """Open for writing; make the group, a kind's array or room for more views where they lack.

        Raises:
            UsageError: the store at `path` is of another identity, precision or k.
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
                    "versions": library_versions(),
                }
                create_group(path, attributes)
        group = open_group(path, "r+")
        store = cls(path, group, index, identity.recipe)
        store._refuse_other(identity.as_dict())
        store._refuse_unsound()
        if group.attrs["precision"] != precision:
            raise UsageError(
                f"{path}: the store's precision",
                expected=str(group.attrs["precision"]),
                found=f"teacher_logits.precision {precision}",
                do="keep one precision a store: set the key back, or remove the store",
            )
        with _writing(path):
            store._make_arrays(views, kind, top_k)
        return store

    @classmethod
    def open_complete(
        cls, path: str, identity: StoreIdentity, index: Index, views: int, kind: str, top_k: int, precision: str
    ) -> Store | None:
        """The store that `create` would open, to read, if it lacks nothing; so it may lie on a read-only disk."""
        if not store_exists(path):
            return None
        store = Store.open(path, index, identity.recipe)
        store._refuse_other(identity.as_dict())
        width = payload_width(kind, store.classes, top_k)
        same = store.attributes["precision"] == precision and kind in store.arrays()
        same = same and (kind == "argmax" or store.array_metadata(kind)["shape"][-1] == width)
        return store if same and not store.missing(views, kind) else None

    def _make_arrays(self, views: int, kind: str, top_k: int) -> None:
        for name in {"argmax": 0, "check": 0, kind: 0}:
            settings = self._settings(name, views, payload_width(kind, self.classes, top_k))
            if name not in self.arrays():
                create_array(self.group, name, settings)
            self._refuse_other_layout(name)
            array, shape = self._opened(name), settings["shape"]
            if array.shape[2:] != shape[2:] and not self._written(name):  # a width that was never used
                self._filesystem.rm_file(f"{self._root}/{name}/zarr.json")
                create_array(self.group, name, settings)
                array = self._opened(name)
            if array.shape[2:] != shape[2:]:
                raise UsageError(
                    f"{self.path}/{name}",
                    expected=f"width {array.shape[2]} as stored",
                    found=f"{shape[2]} asked for",
                    do="set teacher_logits.top_k back",
                )
            if array.shape[0] < shape[0]:
                array.resize(shape)

    def _opened(self, name: str) -> zarr.Array:
        return cast(zarr.Array, self.group[name])

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
                array = self._opened(name)
                whole = np.full((block, self.capacity, *array.shape[2:]), array.fill_value, array.dtype)
                whole[:, :samples] = buffers[name]
                slots[:, self.slots + KINDS.index(name)] = [checksum(view) for view in whole[:, :samples]]
                if name == "argmax":
                    self._opened("check")[views, unit.shard] = slots
                    self._sync(unit, *(set(buffers) - {"argmax"}), "check")
                array[views, rows] = whole
            self._sync(unit, "argmax")

    def _sync(self, unit: Unit, *names: str) -> None:
        """Chunks and their folders onto the disk, so that after a power cut, too, argmax says complete."""
        if self._local:
            for name in names:
                chunk = Path(self._chunk_path(name, unit.shard, unit.block))
                for path in (chunk, chunk.parent):
                    descriptor = os.open(path, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.close(descriptor)

    def _other_slots(self, unit: Unit) -> np.ndarray:
        """The unit's check as it is, for the checksums of kinds that are not written now."""
        try:
            return np.array(self.read_check(unit))
        except Damaged:
            # never written, or damaged: without their checksums the other kinds' answers are lost too
            self.remove_unit(unit, tuple(name for name in KINDS if name in self.arrays()))
            return np.full((self.recipe.block, self.slots + len(KINDS)), NO_CHECK, np.uint64)

    def remove_unit(self, unit: Unit, names: tuple[str, ...] = ("argmax",)) -> None:
        """Take a unit back: delete chunks of it, its argmax first, which says that it is complete."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # asked anew: a listing may be an old one
                self._filesystem.rm_file(self._chunk_path(name, unit.shard, unit.block))
        self._cache.clear()


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """Write chunks even where they equal the fill value; tell a full disk plainly."""
    try:
        with zarr.config.set({"array.write_empty_chunks": True}):
            yield
    except Exception as error:
        if not is_io_error(error):
            raise
        raise unwritable(f"{path}: the store", error) from error


def sweep_store(path: str, own: str = "") -> None:
    """Remove the temporary files that killed writers left in a store and beside it, unless somebody may be writing.

    Args:
        own: the lock that the caller holds itself.
    """
    place = Path(path)
    # listed before the locks are looked at: who writes one of them held its lease already
    partials = [*place.rglob("*.partial"), *place.parent.glob(f"{place.name}.part-*.partial")]
    if partials and not {Path(lock).name for lock in possibly_held(path)} - {Path(own).name}:
        for partial in partials:
            if not (own and partial.name.startswith(f"{Path(own).name}.")):
                with contextlib.suppress(OSError):  # a disk that is read-only by now
                    partial.unlink(missing_ok=True)
