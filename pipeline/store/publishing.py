"""Publishing a complete store, so that others need no teacher: `pipeline store publish`."""

import contextlib
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec

from pipeline.batches.plan import Unit
from pipeline.common.errors import PipelineError, Unreadable, UsageError, is_io_error, unreadable, unwritable
from pipeline.common.files import atomic_write, is_local
from pipeline.common.progress import progress
from pipeline.common.wording import count_of
from pipeline.config.store_spec import StoreSpec
from pipeline.store import publication as form
from pipeline.store.card import describe as describe_card
from pipeline.store.encoding import classes_per_row, row_bytes
from pipeline.store.manifest import build_manifest
from pipeline.store.packs import array_bytes, build_pack, pack_bytes, pack_shapes, read_arrays, shard_ranges
from pipeline.store.publication import File, PackFile, Publication, Source
from pipeline.store.reader import Store


class Target(Protocol):
    """Where a publication is written to."""

    def has(self, name: str, size: int) -> bool:
        """Whether there is a complete file with this name and size."""
        ...

    def write(self, name: str, data: bytes) -> None: ...


class FolderTarget:
    """A folder at a path or URL. Files are complete or absent: renamed locally, single PUTs at object stores."""

    def __init__(self, where: str):
        self._filesystem, root = fsspec.core.url_to_fs(where)
        self._root = root.rstrip("/")

    def has(self, name: str, size: int) -> bool:
        try:
            return self._filesystem.info(f"{self._root}/{name}")["size"] == size
        except FileNotFoundError:
            return False

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._root}/{name}"
        if is_local(self._filesystem):
            with atomic_write(Path(path)) as temporary:
                temporary.write_bytes(data)
        else:
            self._filesystem.pipe_file(path, data)


class ArchiveTarget:
    """A tar file with deterministic bytes."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar

    def has(self, name: str, size: int) -> bool:
        return False

    def write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


@contextlib.contextmanager
def open_target(where: str) -> Iterator[Target]:
    """A folder, or a `.tar` that appears when the block has succeeded.

    Raises:
        PipelineError: the disk is full, or the server refuses.
    """
    try:
        if not form.is_archive(where):
            yield FolderTarget(where)
            return
        filesystem, path = fsspec.core.url_to_fs(where)
        if is_local(filesystem):
            with atomic_write(Path(path)) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                yield ArchiveTarget(tar)
            return
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(f"{folder}/store.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                yield ArchiveTarget(tar)
            filesystem.put_file(f"{folder}/store.tar", path)
    except PipelineError:
        raise
    except Exception as error:
        if not is_io_error(error) and "://" not in where:
            raise
        raise unwritable(where, error) from error


def publish_store(
    store: Store, spec: StoreSpec, where: str, teacher_metrics: dict[str, Any], dry_run: bool = False
) -> Publication | None:
    """Write a complete store to a folder or a `.tar`; what a killed or an earlier call wrote is kept.

    Args:
        teacher_metrics: accuracy of the teacher, for the card.
        dry_run: only print what would be written, and return None.

    Raises:
        PipelineError: the store is incomplete or damaged, or `where` cannot be written.
        UsageError: another store, or something else, is there.
    """
    units = {kind: build_manifest(store, spec.views, kind)["units"] for kind in dict.fromkeys(("argmax", spec.kind))}
    existing = _existing(where)
    if existing:
        _check_same(store, spec, units, existing, where)
        if existing.views > spec.views:
            print(f"{where}: already published with {existing.views} views")
            return None if dry_run else existing
    if dry_run:
        print(_describe_plan(store, spec, existing, where))
        return None
    with open_target(where) as target:
        packs = _write_packs(store, spec, existing, target)
        metrics = teacher_metrics or (existing.teacher_metrics if existing else {})
        draft = Publication(
            format=form.FORMAT, fingerprint=store.fingerprint, index=store.index.fingerprint,
            recipe=store.attributes["recipe"], recipe_settings=store.attributes["recipe_settings"],
            teacher=store.attributes["teacher"], teacher_metrics=metrics, precision=store.attributes["precision"],
            kind=spec.kind, width=_width(store, spec.kind), views=spec.views, classes=store.index.classes,
            shards=store.attributes["shards"], units=units, versions=store.attributes["versions"], files=[], packs=packs,
            sampling=store.attributes.get("sampling"),
        )  # fmt: skip
        files = [
            _write(target, existing, form.SAMPLES, array_bytes(form.sample_table(store.index))),
            _write(target, existing, form.CARD, describe_card(draft).encode()),
        ]
        published = draft.model_copy(update={"files": files})
        target.write(form.MANIFEST, form.to_json(published))
    return published


def _existing(where: str) -> Publication | None:
    """What is published in a folder or archive already.

    Raises:
        UsageError: there is something else.
        Unreadable: a disk or server does not answer.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(where)
        # `exists` would take any error for absence, and what is there would be overwritten
        filesystem.info(path if form.is_archive(where) else f"{path.rstrip('/')}/{form.MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # servers' clients raise nearly anything
        raise unreadable(where, error) from error
    try:
        return Source(where).publication
    except Unreadable:
        raise
    except PipelineError as error:
        raise UsageError(
            f"{where}: something else is here",
            expected="nothing, or a published store", found=str(error).splitlines()[0],
            do="name another place, or remove what is there",
        ) from error  # fmt: skip


def _check_same(
    store: Store, spec: StoreSpec, units: dict[str, dict[str, list[str]]], existing: Publication, where: str
) -> None:
    """Refuse to mix two stores in one folder."""
    found = ""
    if existing.fingerprint != store.fingerprint:
        found = f"store {existing.fingerprint}"
    elif (existing.kind, existing.width) != (spec.kind, _width(store, spec.kind)):
        found = f"the kind {existing.kind}"
    elif existing.precision != store.attributes["precision"]:
        found = f"the precision {existing.precision}"
    else:
        blocks = min(existing.views, spec.views) // store.recipe.block
        first = {kind: {name: hashes[:blocks] for name, hashes in named.items()} for kind, named in units.items()}
        were = {kind: {name: hashes[:blocks] for name, hashes in named.items()} for kind, named in existing.units.items()}
        if first != were:
            found = "other predictions: the store was computed again since"
    if found:
        raise UsageError(
            f"{where}: another store is published here",
            expected=f"nothing, or store {store.fingerprint} as {spec.kind}", found=found, do="name another folder",
        )  # fmt: skip


Key = tuple[int, range, str]
"""A pack's block, shards and array."""


def _pack_keys(store: Store, spec: StoreSpec) -> list[Key]:
    """All packs, by view, so that more views only add to the list."""
    size = row_bytes(spec.kind, store.classes, classes_per_row(spec.kind, _width(store, spec.kind)))
    ranges = shard_ranges(store.index.samples.tolist(), store.recipe.block, size)
    arrays = dict.fromkeys(("argmax", spec.kind))
    return [(block, shards, array) for block in range(spec.blocks) for shards in ranges for array in arrays]


def _known_packs(existing: Publication | None) -> dict[Key, PackFile]:
    packs = existing.packs if existing else []
    return {(pack.block, range(pack.first, pack.last + 1), pack.array): pack for pack in packs}


def _write_packs(store: Store, spec: StoreSpec, existing: Publication | None, target: Target) -> list[PackFile]:
    """Write the packs that are missing; returns all of them."""
    keys, known, packs = _pack_keys(store, spec), _known_packs(existing), []
    with progress(len(keys), "store publish", "pack") as bar:
        for key in keys:
            pack = known.get(key)
            if pack is None or not target.has(pack.name, pack.bytes):
                pack = _write_pack(store, *key, target)
            packs.append(pack)
            bar.update()
    return packs


def _describe_plan(store: Store, spec: StoreSpec, existing: Publication | None, where: str) -> str:
    """What publishing would write, as text."""
    keys, known = _pack_keys(store, spec), {} if form.is_archive(where) else _known_packs(existing)
    new = [key for key in keys if key not in known]
    size = sum(
        pack_bytes(pack_shapes(store, _filled(store, shards), array, _width(store, array))) for _, shards, array in new
    )
    samples = len(array_bytes(form.sample_table(store.index)))
    kept = f"; {count_of(len(keys) - len(new), 'pack')} of an earlier call stay as they are" * (len(new) < len(keys))
    return (
        f"{where}: {len(store.index):,} images x {spec.views} views as {spec.kind}\n"
        f"  would be written: {count_of(len(new), 'pack')} of predictions, {size / 1e6:,.2f} MB{kept}\n"
        f"  and {form.SAMPLES}, {samples / 1e6:,.2f} MB, {form.CARD} and {form.MANIFEST}"
    )


def _filled(store: Store, shards: range) -> list[int]:
    """The shards that have samples."""
    return [shard for shard in shards if store.index.samples[shard]]


def _write_pack(store: Store, block: int, shards: range, array: str, target: Target) -> PackFile:
    data = build_pack({shard: read_arrays(store, Unit(shard, block), array) for shard in _filled(store, shards)})
    sha256 = hashlib.sha256(data).hexdigest()
    first = block * store.recipe.block
    views = f"{first:05d}-{first + store.recipe.block - 1:05d}"
    # named by content: a file of this name and size is this one, whoever wrote it
    name = f"packs/{views}-{array}-{shards.start:06d}-{sha256[:16]}.tar"
    if not target.has(name, len(data)):
        target.write(name, data)
    return PackFile(
        name=name, bytes=len(data), sha256=sha256, array=array, block=block, first=shards.start, last=shards.stop - 1
    )


def _write(target: Target, existing: Publication | None, name: str, data: bytes) -> File:
    """Write a file unless the existing publication has it."""
    file = File(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    if not (existing and file in existing.files and target.has(name, len(data))):
        target.write(name, data)
    return file


def _width(store: Store, kind: str) -> int:
    return 0 if kind == "argmax" else int(store.array_metadata(kind)["shape"][-1])


def read_teacher_metrics(folder: Path, teacher: dict[str, Any]) -> dict[str, Any]:
    """What a published teacher's metrics.json says of its accuracy; empty if it is another teacher's or missing."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        same = metrics.get("weights") == teacher.get("weights")
    except (OSError, ValueError, AttributeError):
        return {}
    return {key: metrics[key] for key in ("top1", "top5", "images", "size") if same and key in metrics}
