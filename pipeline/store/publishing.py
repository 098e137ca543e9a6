"""Publishing a complete store, so that others need no teacher: `pipeline store publish`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec

from pipeline.batches.plan import Unit
from pipeline.common.errors import PipelineError, Unreadable, UsageError, unreadable
from pipeline.common.progress import progress
from pipeline.common.wording import count_of, size_of
from pipeline.config.store_spec import StoreSpec
from pipeline.store import publication as form
from pipeline.store.card import TITLE
from pipeline.store.card import describe as describe_card
from pipeline.store.kinds import classes_per_row, row_bytes
from pipeline.store.manifest import build_manifest
from pipeline.store.packs import array_bytes, build_pack, pack_bytes, pack_shapes, read_arrays, shard_ranges
from pipeline.store.publication import File, PackFile, Publication, Source
from pipeline.store.reader import Store
from pipeline.store.targets import Target, open_target


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
    except NotADirectoryError:
        return None
    except FileNotFoundError:
        if not form.is_archive(where):
            _check_free(where)
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


def _check_free(where: str) -> None:
    """Refuse a folder without a manifest whose files publishing would overwrite, unless a killed call wrote them.

    Raises:
        UsageError: there are other files.
        Unreadable: a disk or server does not answer.
    """
    filesystem, path = fsspec.core.url_to_fs(where)
    try:
        names = {entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(path, detail=False)}
        other = sorted(name for name in names - {"packs", form.SAMPLES, form.CARD} if not name.startswith("."))
        card = filesystem.cat_file(f"{path.rstrip('/')}/{form.CARD}") if form.CARD in names else TITLE
    except FileNotFoundError:
        return
    except Exception as error:  # servers' clients raise nearly anything
        raise unreadable(where, error) from error
    if not card.startswith(TITLE) or (form.SAMPLES in names and "packs" not in names):
        other = sorted(names & {form.CARD, form.SAMPLES})
    if other:
        raise UsageError(
            f"{where}: something else is here",
            expected="nothing, an empty folder, or a published store", found=", ".join(other[:5]), do="name another folder",
        )  # fmt: skip


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
            found = "other predictions: the store was recomputed since"
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
    kept = f"; {count_of(len(keys) - len(new), 'pack')} from an earlier call are kept" * (len(new) < len(keys))
    return (
        f"{where}: {len(store.index):,} images x {spec.views} views as {spec.kind}\n"
        f"  would be written: {count_of(len(new), 'pack')} of predictions, {size_of(size)}{kept}\n"
        f"  and {form.SAMPLES}, {size_of(samples)}, {form.CARD} and {form.MANIFEST}"
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
    """What a published teacher's metrics.json says about its accuracy; empty if it is missing or another teacher's."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        described = {**metrics.get("architecture", {}), "weights": metrics.get("weights")}
        described |= {"size": metrics["size"]} if "size" in metrics else {}
        same = all(teacher.get(key) == value for key, value in described.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return {key: metrics[key] for key in ("top1", "top5", "images", "size") if same and key in metrics}
