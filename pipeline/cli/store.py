"""Looking after stores: what one would cost, what is in it, whether it is whole, mending, clearing up.

No stage of `dvc repro`. Everything works on a partial store and says what is missing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import torch
from tqdm import tqdm

from pipeline.batches.plan import Unit
from pipeline.cli.glance import list_stores
from pipeline.cli.progress import is_store_of
from pipeline.common.errors import IO_ERRORS, PipelineError, UsageError
from pipeline.config.paths import index_path, store_path, teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import StoreSpec, store_spec
from pipeline.shards.index import Index
from pipeline.store.encoding import row_bytes
from pipeline.store.manifest import build_manifest, damaged_units, read_manifest, store_bytes
from pipeline.store.reader import Store
from pipeline.store.writer import StoreWriter


def find(config: Config, purpose: str, index: Index, named: str | None = None) -> Store:
    """The configuration's store: named by hand, by its manifest, or the one that fits index and recipe.

    Raises:
        PipelineError: there is none, or it is damaged. UsageError: several fit.
    """
    recipe = store_spec(config, purpose).recipe
    if named:
        return Store.open(named, index, recipe)
    published = teacher_logits_folder(config, purpose) / "manifest.json"
    if published.exists():
        path = store_path(config, read_manifest(published)["fingerprint"])
        return Store.open(path, index, recipe)
    fitting = [
        path
        for path, attributes in list_stores(config.work)
        if is_store_of(recipe, index.fingerprint, attributes)
    ]
    if len(fitting) > 1:
        raise UsageError(
            "which store?", expected="--store PATH", found=", ".join(fitting),
            do="name one: they are of different teachers",
        )  # fmt: skip
    if not fitting:
        raise PipelineError(
            f"{config.work}/stores: no store of this index and recipe", do="run: pipeline teacher-logits"
        )
    return Store.open(fitting[0], index, recipe)


# info


def info(config: Config, purpose: str, named: str | None) -> None:
    """Print what the store is of and how far it is."""
    index, spec = Index(index_path(config, "train")), store_spec(config, purpose)
    store = find(config, purpose, index, named)
    attributes = store.attributes
    print(f"{store.path}: {store_bytes(store.path) / 1e6:,.1f} MB")
    print(f"  of      {len(index):,} images in {len(index.names)} shards, {store.classes} classes")
    print(f"  recipe  {attributes['recipe']}, {spec.recipe.size} px, blocks of {spec.recipe.block} views")
    print(f"  teacher {json.dumps(attributes['teacher'])}, {attributes['precision']}")
    print(f"  with    {', '.join(f'{name} {version}' for name, version in attributes['versions'].items())}")
    for kind in store.arrays():
        if kind != "check":
            units, missing = len(store.units(store.views)), len(store.missing(store.views, kind))
            print(f"  {kind}: {units - missing:,} of {units:,} units of {store.views} views")
    print(_missing(store, store.missing(spec.views, spec.kind), spec))


def _missing(store: Store, units: list[Unit], spec: StoreSpec) -> str:
    asked = f"{spec.views} views as {spec.kind}"
    if not units:
        return f"complete: {asked}"
    named = ", ".join(f"{store.index.names[unit.shard]} block {unit.block}" for unit in units[:5])
    more = "" if len(units) <= 5 else f" and {len(units) - 5:,} more"
    return f"incomplete: of {asked} {len(units):,} units are missing: {named}{more}; run: pipeline teacher-logits"


# verify and repair


def verify(config: Config, purpose: str, named: str | None, recompute: int, device: torch.device) -> None:
    """Read everything: shards and tables of both indices, manifest, every chunk; compute `recompute` units again.

    Raises:
        PipelineError: something is damaged or missing; all of it is printed before.
    """
    problems, spec = [], store_spec(config, purpose)
    index, val = (Index(index_path(config, split)) for split in ("train", "val"))
    problems += [*_damaged_data(index), *_damaged_data(val)]
    store = find(config, purpose, index, named)
    missing = store.missing(spec.views, spec.kind)
    problems += [found for _, found in damaged_units(store, _written_units(store, spec, missing), spec.kind)]
    if missing:
        problems.append(_missing(store, missing, spec))
    arrays = {"argmax", "check", spec.kind} & set(store.arrays())
    room = max((store.array_metadata(name)["shape"][0] for name in arrays), default=0)
    if room > spec.views and (further := store.missing(room, spec.kind)):
        problems.append(f"{store.path}: room for {room} views, of which {len(further):,} units are missing")
    published = teacher_logits_folder(config, purpose) / "manifest.json"
    if published.exists() and not named and not problems:
        problems += _other_manifest(store, published)
    if recompute and not problems:
        problems += _other_answers(config, purpose, store, recompute, device)
    for problem in problems:
        print(problem)
    if problems:
        raise PipelineError(
            f"{store.path}: {len(problems)} problems, named above",
            do="pipeline store repair, then pipeline teacher-logits; for shards and index: pipeline prepare",
        )
    units = len(store.units(spec.views))
    print(f"{store.path}: whole: {units:,} units, {len(index.names)} shards, every checksum as recorded")


def _damaged_data(index: Index) -> list[str]:
    """Shards whose bytes, and rows whose table, are not those of the index."""
    found = []
    for number, shard in enumerate(tqdm(index.shards, desc="shards", unit="shard", leave=False)):
        where = f"{index.location}/{shard['name']}"
        try:
            index.rows(number)
            with fsspec.open(where, "rb") as file:
                same = hashlib.file_digest(cast(Any, file), "sha256").hexdigest() == shard["sha256"]
            if not same:
                found.append(f"{where}: its SHA-256 is not that of the index: damaged or replaced")
        except (PipelineError, *IO_ERRORS) as error:
            found.append(f"{where}: {error}")
    return found


def _written_units(store: Store, spec: StoreSpec, missing: list[Unit]) -> list[Unit]:
    gone = set(missing)
    return [unit for unit in store.units(spec.views) if unit not in gone]


def _other_manifest(store: Store, path: Path) -> list[str]:
    published = read_manifest(path)
    try:
        same = build_manifest(store, published["views"], published["kind"]) == published
    except (PipelineError, KeyError, TypeError) as error:
        return [f"{path}: {error}"]
    return [] if same else [f"{path}: it does not stand for {store.path}: damaged, or the store was computed anew"]


def _other_answers(config: Config, purpose: str, store: Store, count: int, device: torch.device) -> list[str]:
    """Compute random units again; prints the largest difference. Flips of the argmax are a problem on the
    device and precision that wrote the store, elsewhere they are rounding."""
    from pipeline.store.labelling import recompute_unit

    spec, problems = store_spec(config, purpose), []
    units = store.units(spec.views)
    chosen = np.random.default_rng().choice(len(units), min(count, len(units)), replace=False)
    for unit in [units[number] for number in chosen]:
        difference = recompute_unit(config, purpose, store, unit, spec.kind, device)
        name = f"{store.index.names[unit.shard]} block {unit.block}"
        print(f"{name}: computed again on {device.type}: {difference}")
        if difference.checks:
            problems.append(f"{name}: {difference.checks} groups are other pictures than the teacher saw")
        if difference.flips > 0.01 * difference.answers:
            problems.append(f"{name}: {difference.flips} of {difference.answers} answers differ: another teacher?")
    return problems


def repair(config: Config, purpose: str, named: str | None) -> None:
    """Drop damaged units, so that teacher-logits computes just them again."""
    index, spec = Index(index_path(config, "train")), store_spec(config, purpose)
    store = StoreWriter.open(find(config, purpose, index, named).path, index, spec.recipe)
    missing = store.missing(spec.views, spec.kind)
    for unit, found in damaged_units(store, _written_units(store, spec, missing), spec.kind):
        print(f"dropped {store.index.names[unit.shard]} block {unit.block}: {found.splitlines()[0]}")
        store.remove_unit(unit)
    print(_missing(store, store.missing(spec.views, spec.kind), spec))


# estimate


def estimate(config: Config, purpose: str, rate: float, images: int | None) -> None:
    """Print bytes, files, hours, and when the dump pays.

    Args:
        rate: views a second that teacher-logits reaches, all processes together.
        images: instead of the index's, where there is none yet.
    """
    spec, settings = store_spec(config, purpose), config.teacher_logits
    samples, classes = _samples(config, images)
    rows, shards, blocks = int(samples.sum()), len(samples), spec.views // spec.recipe.block
    width = row_bytes(spec.kind, classes, settings.top_k)
    arrays = 2 if spec.kind == "argmax" else 3
    groups = int(np.ceil(samples.max() / spec.recipe.group_size))
    answers = spec.views * shards * int(samples.max()) * width
    checks = spec.views * shards * (groups + 4) * 8
    uneven = shards * int(samples.max()) / rows - 1
    hours = rows * spec.views / rate / 3600
    print(f"{rows:,} images x {spec.views} views as {spec.kind}, {classes} classes, {shards:,} shards")
    print(f"  bytes  {(answers + checks) / 1e9:,.2f} GB: {width} a view, checks {checks / spec.views / rows:.2f} more,")
    print(f"         shards of uneven size add {uneven:.1%}")
    print(f"  files  {shards * blocks * arrays:,}: {arrays} arrays x {shards:,} shards x {blocks} blocks")
    print(f"  time   {hours:,.1f} h at {rate:,.0f} views/s, all processes together")
    _break_even(config, spec, classes)


def _samples(config: Config, images: int | None) -> tuple[np.ndarray, int]:
    if images is None:
        index = Index(index_path(config, "train"))
        return index.samples, len(index.classes)
    shards = -(-images // config.data.shard_samples)
    return np.array([len(part) for part in np.array_split(np.empty(images), shards)]), 1000


def _break_even(config: Config, spec: StoreSpec, classes: int) -> None:
    """From multiply-adds: a student's step is three forwards of it, online one of the teacher more."""
    from pipeline.models.build import build_student, build_teacher
    from pipeline.models.evaluation import multiply_adds

    epochs = config.student.epochs if spec.purpose == "train-student" else config.finetune.epochs
    student = config.student
    if spec.purpose == "finetune" and config.finetune.students:
        student = config.finetune_student(config.finetune.students[0])
    teacher = multiply_adds(build_teacher(config.teacher, classes), spec.teacher_size)
    own = multiply_adds(build_student(student, config.recipe, classes, spec.recipe.size), spec.recipe.size)
    print(f"  pays   after {spec.views / epochs:.2f} students of {epochs} epochs: the dump is {spec.views} forwards of")
    print(f"         the teacher an image, each student with the teacher in the loop would be {epochs}")
    print(
        f"  then   a step is {1 + teacher / (3 * own):.2f} times as fast as with the teacher in the loop, by"
        f" multiply-adds\n         ({teacher / 1e9:.3g} G the teacher, 3 x {own / 1e9:.3g} G {student.model})"
    )
