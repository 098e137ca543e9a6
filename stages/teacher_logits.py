"""The teacher's answers about views 0..V-1 of every training image, into the store.

Resumable at any moment: what exists is complete, and only missing units are computed. A larger V adds
blocks. Several processes (torchrun, or `--part i/n`) share the units.
"""

import json
import os

import torch

from pipeline.batches.plan import Unit
from pipeline.common.errors import NotReady
from pipeline.common.files import atomic_write
from pipeline.common.lease import part_lease, part_lease_path
from pipeline.config.paths import NOT_NEEDED, index_path, store_path, teacher_logits_folder
from pipeline.config.schema import Config, Recipe
from pipeline.config.store_spec import store_spec
from pipeline.models.teacher import describe_teacher, load_teacher
from pipeline.shards.index import Index
from pipeline.store.encoding import row_bytes
from pipeline.store.labelling import UnitWorker, publish, remove_damaged
from pipeline.store.manifest import damaged_units, write_manifest
from pipeline.store.reader import StoreIdentity
from pipeline.store.writer import StoreWriter, sweep_store


def run(
    config: Config,
    device: torch.device,
    purpose: str = "train-student",
    part: tuple[int, int] | None = None,
    dry_run: bool = False,
    break_lock: bool = False,
) -> None:
    """Fill the store for `train-student` or, at the higher resolution, for `finetune`.

    Raises:
        PipelineError: damaged shards, a full disk, a teacher that answers NaN.
        UsageError: another process writes the same part, or divides the store into another number of parts.
    """
    index = Index(index_path(config, "train"))
    spec = store_spec(config, purpose)
    recipe, views, own_size = spec.recipe, spec.views, spec.teacher_size
    try:
        teacher = load_teacher(config, len(index.classes), device, purpose)
    except NotReady as error:
        if not dry_run:
            raise
        print(describe(config, index, recipe, views, "a store that is named when the teacher is there"))
        print(f"not yet: {error}")
        return
    identity = StoreIdentity(index.fingerprint, recipe, describe_teacher(config.teacher, teacher, own_size))
    path, settings = store_path(config, identity.fingerprint), config.teacher_logits
    print(describe(config, index, recipe, views, path))
    if dry_run:
        return
    number, parts = part or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    asked = (identity, index, views, settings.kind, settings.top_k, settings.precision)
    # complete, it needs no lock, which a read-only disk has no place for
    store, bad = StoreWriter.open_complete(path, *asked), []
    verified: list[Unit] = []
    if store and number and not part:
        print("the store is complete; the first process of the job publishes it")
        return
    if store:
        verified = store.units(views)[number::parts] if part else store.units(views)
        bad = [unit for unit, _ in damaged_units(store, verified, settings.kind)]
    if bad or not store:
        with part_lease(path, number, parts, f"part {number} of {parts} of teacher-logits", break_lock):
            sweep_store(path, part_lease_path(path, number, parts))
            store = StoreWriter.create(path, *asked)
            # by its place among all units: other parts commit theirs meanwhile
            own = {*store.units(views)[number::parts], *bad}
            remove_damaged(store, settings.kind, bad)
            missing = [unit for unit in store.missing(views, settings.kind) if unit in own]
            if missing:
                UnitWorker(config, store, teacher, own_size, device, store.write_unit).compute(missing)
        if store.missing(views, settings.kind):
            print("this part is done; the last part to finish writes the manifest")
            return
    publish(config, purpose, store, views, set(verified) - set(bad))


def mark_unneeded(config: Config, purpose: str) -> None:
    """In the place of manifest and summary, for DVC: no student listens, so nothing is computed."""
    folder = teacher_logits_folder(config, purpose)
    write_manifest(folder / "manifest.json", NOT_NEEDED)
    with atomic_write(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(NOT_NEEDED) + "\n")
    print(f"teacher-logits for {purpose}: not needed, no student listens to a teacher")


def describe(config: Config, index: Index, recipe: Recipe, views: int, path: str) -> str:
    """What would be done: units, views, bytes, folder."""
    settings, classes = config.teacher_logits, len(index.classes)
    shards, blocks = len(index.names), views // recipe.block
    rows = shards * int(index.samples.max())
    groups = shards * (-(-int(index.samples.max()) // recipe.group_size) + 3)
    size = views * (rows * row_bytes(settings.kind, classes, settings.top_k) + groups * 8)
    fewer = ""
    if settings.kind == "topk" and classes < settings.top_k:
        fewer = f"  top_k {settings.top_k}: there are {classes} classes, and all are kept"
    return (
        f"teacher-logits: {len(index):,} images x {views} views at {recipe.size} px = {len(index) * views:,} views,"
        f" {shards} shards x {blocks} blocks = {shards * blocks:,} units\n"
        f"  {settings.kind}: about {size / 1e6:,.1f} MB, {size / max(views * len(index), 1):.2f} bytes a view: {path}"
        + (f"\n{fewer}" * bool(fewer))
    )
