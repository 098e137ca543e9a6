"""Maintenance of a store: describe it, verify it, remove what is damaged.

Everything works on a partial store and says what is missing.
"""

import json
from pathlib import Path

import numpy as np
import torch

from pipeline.batches.plan import Unit
from pipeline.common.errors import PipelineError
from pipeline.common.lease import part_lease
from pipeline.common.progress import progress
from pipeline.common.wording import count_of, size_of
from pipeline.config.paths import index_path
from pipeline.config.schema import Config
from pipeline.config.store_spec import StoreSpec
from pipeline.shards.index import Index
from pipeline.shards.indexing import shard_sha256
from pipeline.store.labelling import recompute
from pipeline.store.manifest import build_manifest, damaged_units, is_manifest_of, read_manifest, store_bytes
from pipeline.store.reader import Store
from pipeline.store.writer import StoreWriter


def describe_store(store: Store, spec: StoreSpec) -> str:
    """Index, recipe, teacher and versions of a store, and how complete it is, as text."""
    attributes = store.attributes
    lines = [
        f"{store.path}: {size_of(store_bytes(store.path))}",
        f"  images  {len(store.index):,} in {count_of(len(store.index.names), 'shard')}, {count_of(store.classes, 'class')}",
        f"  recipe  {attributes['recipe']}, {spec.recipe.size} px, blocks of {spec.recipe.block} views",
        f"  teacher {json.dumps(attributes['teacher'])}, {attributes['precision']}",
        f"  with    {', '.join(f'{name} {version}' for name, version in attributes['versions'].items())}",
    ]
    for kind in store.arrays():
        if kind != "check":
            units, missing = len(store.units(store.views)), len(store.missing(store.views, kind))
            lines.append(f"  {kind}: {units - missing:,} of {units:,} units of {store.views} views")
    return "\n".join([*lines, describe_missing(store, spec)])


def describe_missing(store: Store, spec: StoreSpec) -> str:
    """Which of the configured units are missing, as text."""
    wanted, missing = f"{spec.views} views as {spec.kind}", store.missing(spec.views, spec.kind)
    if not missing:
        return f"complete: {wanted}"
    named = ", ".join(_name(store, unit) for unit in missing[:5])
    more = "" if len(missing) <= 5 else f" and {len(missing) - 5:,} more"
    return f"incomplete: of {wanted}, {count_of(len(missing), 'unit')} missing: {named}{more}; run: {spec.command}"


def verify(
    config: Config, spec: StoreSpec, store: Store, published: Path | None, count: int, device: torch.device
) -> None:
    """Read everything (shards and indices, manifest, every chunk), and compute `count` units again.

    Args:
        published: the store's manifest, compared if there is such a file.

    Raises:
        PipelineError: something is damaged or missing; each problem is printed before.
    """
    val = Index(index_path(config, "val"))
    problems = [*_damaged_data(store.index), *_damaged_data(val), *_damaged_store(store, spec)]
    if published and published.exists() and not problems:
        problems += _other_manifest(store, published)
    _raise_if(problems, store, f"pipeline store repair, then {spec.command}; for shards and index: pipeline prepare")
    problems = _other_predictions(config, spec, store, count, device) if count else []
    _raise_if(problems, store, f"compare teacher, precision and versions: pipeline store info; or move the store away, then {spec.command}")
    if further := _incomplete_beyond(store, spec):
        print(further)
    units = len(store.units(spec.views))
    print(f"{store.path}: valid: {count_of(units, 'unit')}, {count_of(len(store.index.names), 'shard')}, every checksum as recorded")


def _raise_if(problems: list[str], store: Store, do: str) -> None:
    """Print the problems, if any, and raise PipelineError."""
    for problem in problems:
        print(problem)
    if problems:
        raise PipelineError(f"{store.path}: {count_of(len(problems), 'problem')}, named above", do=do)


def _damaged_data(index: Index) -> list[str]:
    """Shards whose bytes, and tables whose rows, do not match the index."""
    found = []
    with progress(len(index.shards), "reading the shards", "shard") as bar:
        for number, shard in enumerate(index.shards):
            where = f"{index.location}/{shard['name']}"
            try:
                index.rows(number)
                if shard_sha256(index.location, shard["name"]) != shard["sha256"]:
                    found.append(f"{where}: its SHA-256 is not that of the index: damaged or replaced")
            except PipelineError as error:
                found.append(str(error))
            bar.update()
    return found


def _damaged_store(store: Store, spec: StoreSpec) -> list[str]:
    """Damaged units, and missing ones."""
    problems = [found for _, found in damaged_units(store, _written(store, spec), spec.kind)]
    if store.missing(spec.views, spec.kind):
        problems.append(describe_missing(store, spec))
    return problems


def _incomplete_beyond(store: Store, spec: StoreSpec) -> str:
    """What is missing beyond the configured views, which another configuration may be computing; empty if nothing is."""
    room = store.array_metadata(spec.kind)["shape"][0]
    missing = len(store.missing(room, spec.kind))
    return f"{store.path}: room for {room} views, more than configured: {count_of(missing, 'unit')} missing" if missing else ""


def _written(store: Store, spec: StoreSpec) -> list[Unit]:
    missing = set(store.missing(spec.views, spec.kind))
    return [unit for unit in store.units(spec.views) if unit not in missing]


def _other_manifest(store: Store, path: Path) -> list[str]:
    """How a published manifest differs from the store."""
    published = read_manifest(path)
    try:
        same = is_manifest_of(published, build_manifest(store, published["views"], published["kind"]))
    except (PipelineError, KeyError, TypeError) as error:
        return [f"{path}: {error}"]
    return [] if same else [f"{path}: it does not match {store.path}: damaged, or the store was recomputed"]


def _other_predictions(config: Config, spec: StoreSpec, store: Store, count: int, device: torch.device) -> list[str]:
    """Compute random units again and print the differences.

    A few flips of the argmax are rounding: the store may have been written on another device.
    """
    problems, units = [], store.units(spec.views)
    chosen = np.random.default_rng().choice(len(units), min(count, len(units)), replace=False)
    for unit, difference in recompute(config, spec, store, [units[number] for number in chosen], device):
        name = _name(store, unit)
        print(f"{name}: recomputed on {device.type}: {difference}")
        if difference.checks:
            problems.append(f"{name}: {difference.checks} groups differ from the pictures that the teacher saw")
        if difference.flips > 0.01 * difference.predictions:
            problems.append(
                f"{name}: {difference.flips} of {difference.predictions} predictions differ: a different teacher?"
            )
    return problems


def _name(store: Store, unit: Unit) -> str:
    return f"{store.index.names[unit.shard]} block {unit.block}"


def remove_damaged(store: StoreWriter, kind: str, units: list[Unit]) -> None:
    """Read all of the units and remove those that are damaged, so that they are computed again.

    Of a unit whose argmax is whole only this kind is removed: other kinds share the argmax.
    """
    for unit, found in damaged_units(store, units, kind):
        print(f"removed a damaged unit: {found}")
        store.remove_unit(unit, (kind,) if store.has_argmax(unit) else ("argmax",))


def repair(store: Store, spec: StoreSpec) -> None:
    """Remove damaged units, so that teacher-logits computes them again; print what is missing.

    Raises:
        UsageError: teacher-logits is running: it may have recomputed what was found damaged.
    """
    writer = StoreWriter.open(store.path, store.index, spec.recipe)
    with part_lease(store.path, 0, 1, "store repair"):
        remove_damaged(writer, spec.kind, _written(writer, spec))
    print(describe_missing(writer, spec))
