"""The teacher's predictions for views 0..V-1 of every training image, written to the store.

It can be stopped at any moment: units that exist are complete, and only missing ones are computed. A larger V adds
blocks. Several processes (torchrun, or `--part i/n`) share the units.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from pipeline.batches.plan import Unit
from pipeline.common.errors import NotReady
from pipeline.common.files import write_json
from pipeline.common.lease import part_lease, part_lease_path
from pipeline.common.versions import library_versions
from pipeline.common.wording import count_of, size_of
from pipeline.config.paths import NOT_NEEDED, store_path, teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import StoreSpec, store_spec
from pipeline.models.teacher import TeacherForward, describe_teacher, load_teacher
from pipeline.shards.index import Index
from pipeline.shards.published import open_index
from pipeline.store.compatibility import check_belongs
from pipeline.store.estimate import estimate
from pipeline.store.fetching import UnitFetcher, check_as_published
from pipeline.store.labelling import UnitWorker
from pipeline.store.maintenance import remove_damaged
from pipeline.store.manifest import damaged_units, publish, write_manifest
from pipeline.store.publication import Source
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.writer import StoreWriter, sweep_store
from pipeline.training.identity import teacher_fingerprint
from pipeline.training.origin import require_teacher


def run(
    config: Config,
    device: torch.device,
    purpose: str = "train-student",
    part: tuple[int, int] | None = None,
    dry_run: bool = False,
    break_lock: bool = False,
) -> None:
    """Fill the store for `train-student` or, at the higher resolution, for `finetune`: by the teacher, or by fetching.

    Raises:
        PipelineError: damaged shards, a full disk, or logits that are not finite.
        UsageError: another process writes the same part, or divides the store into a different number of parts.
    """
    index, spec = open_index(config, "train"), store_spec(config, purpose)
    try:
        origin = from_publication(spec, index) if spec.fetch else from_teacher(config, spec, index, device)
    except NotReady as error:
        if not dry_run:
            raise
        print(describe(spec, index, "a store named after the teacher's weights"))
        print(f"not yet: {error}")
        return
    spec, identity = origin.spec, origin.identity
    path = store_path(config, identity.fingerprint)
    print(describe(spec, index, path))
    if dry_run:
        return
    share = part or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    arguments = (path, identity, index, spec.views, spec.kind, spec.k, spec.precision)
    # a complete store needs no lock, which could not be created on a read-only disk
    store, bad, verified = StoreWriter.open_complete(*arguments), [], []
    if store and share[0] and not part:
        print("the store is complete; the first process of the job publishes it")
        return
    if store:
        verified = store.units(spec.views)[part[0] :: part[1]] if part else store.units(spec.views)
        bad = [unit for unit, _ in damaged_units(store, verified, spec.kind)]
    if bad or not store:
        with locked(path, share, break_lock):
            store = StoreWriter.create(*arguments, origin.versions)
            fill(store, spec, origin.compute, share, bad)
        if store.missing(spec.views, spec.kind):
            print("this part is done; the last part to finish writes the manifest")
            return
    origin.check(store)
    teacher = None if spec.fetch else teacher_fingerprint(config, index.fingerprint, purpose)
    publish(spec, store, teacher, set(verified) - set(bad))


@dataclass(frozen=True)
class PredictionSource:
    """Where a store's predictions come from."""

    spec: StoreSpec
    identity: StoreIdentity
    versions: dict[str, str]
    """Versions of the libraries that compute, or computed, them."""
    compute: Callable[[StoreWriter, list[Unit]], None]
    """Commits units."""
    check: Callable[[Store], None] = lambda store: None
    """Checks the complete store."""


def from_teacher(config: Config, spec: StoreSpec, index: Index, device: torch.device) -> PredictionSource:
    """The teacher is run.

    Raises:
        NotReady: there is no teacher yet.
    """
    require_teacher(config, index.fingerprint, spec.purpose)
    teacher = load_teacher(config, index.classes, device, spec.purpose)
    described = describe_teacher(config.teacher, teacher, spec.teacher_size)

    def compute(store: StoreWriter, units: list[Unit]) -> None:
        forward = TeacherForward(teacher, config.teacher_logits, spec.teacher_size)
        UnitWorker(config.teacher_logits, store, forward, device, store.add_kind).compute(units)

    identity = StoreIdentity(index.fingerprint, spec.recipe, described, spec.sampling)
    return PredictionSource(spec, identity, library_versions(), compute)


def from_publication(spec: StoreSpec, index: Index) -> PredictionSource:
    """The predictions are published at `spec.fetch`; no teacher is needed.

    Raises:
        PipelineError: it cannot be read.
        UsageError: it belongs to different images or a different recipe; see `check_belongs`.
    """
    source = Source(str(spec.fetch))
    published = source.publication
    print(f"{source.where}: {published.describe()}")
    check_belongs(source, index, spec)
    if spec.kind == "topk" and published.k != min(spec.k, len(index.classes)):
        print(f"teacher_logits.top_k {spec.k}: {count_of(published.k, 'class')} per view are published and used")
    spec = replace(spec, precision=published.precision, k=published.k)
    return PredictionSource(
        spec, StoreIdentity(index.fingerprint, spec.recipe, published.teacher, spec.sampling), published.versions,
        compute=lambda store, units: UnitFetcher(source, store, spec.kind).compute(units),
        check=lambda store: check_as_published(store, source, spec),
    )  # fmt: skip


@contextlib.contextmanager
def locked(path: str, part: tuple[int, int], break_lock: bool) -> Iterator[None]:
    """Hold the lease of a part of a store, in which no temporary files of killed writers are left."""
    with part_lease(path, *part, f"part {part[0]} of {part[1]} of teacher-logits", break_lock):
        sweep_store(path, part_lease_path(path, *part))
        yield


def fill(
    store: StoreWriter,
    spec: StoreSpec,
    compute: Callable[[StoreWriter, list[Unit]], None],
    part: tuple[int, int],
    bad: list[Unit],
) -> None:
    """Compute or fetch the missing units of a part, and the bad ones if they are still damaged."""
    number, parts = part
    # by their place among all units, since other parts commit theirs meanwhile
    own = {*store.units(spec.views)[number::parts], *bad}
    remove_damaged(store, spec.kind, bad)
    if missing := [unit for unit in store.missing(spec.views, spec.kind) if unit in own]:
        compute(store, missing)


def mark_unneeded(config: Config, purpose: str) -> None:
    """Write placeholders for DVC instead of manifest and summary: no configured student is distilled."""
    folder = teacher_logits_folder(config, purpose)
    write_manifest(folder / "manifest.json", NOT_NEEDED)
    write_json(folder / "summary.json", NOT_NEEDED)
    print(f"teacher-logits for {purpose}: not needed, no student learns from one")


def describe(spec: StoreSpec, index: Index, path: str) -> str:
    """What would be done, as text: views, units, bytes, path."""
    size = estimate(spec, index.samples.tolist(), len(index.classes))
    text = (
        f"teacher-logits: {size.rows:,} images x {spec.views} views at {spec.recipe.size} px ="
        f" {size.rows * spec.views:,} views, {count_of(size.shards, 'shard')} x {count_of(size.blocks, 'block')} ="
        f" {count_of(size.units, 'unit')}\n"
        f"  {spec.kind}: about {size_of(size.bytes)}, {size.bytes_per_view:.2f} bytes per view: {path}"
    )
    if spec.sampling is not None:
        text += f"\n  drawn: {count_of(spec.k, 'class')} per view, at temperature {spec.sampling['tau']:g}"
    if spec.kind == "topk" and len(index.classes) < spec.k:
        text += f"\n  top_k {spec.k}: there are {len(index.classes)} classes, and all are stored"
    return text
