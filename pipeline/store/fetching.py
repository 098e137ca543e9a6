"""Fetching published predictions into a local store, in place of running the teacher."""

from itertools import groupby

import numpy as np

from pipeline.batches.plan import Unit
from pipeline.common.errors import Damaged, PipelineError
from pipeline.common.progress import progress
from pipeline.config.store_spec import StoreSpec
from pipeline.store.layout import NO_CHECK
from pipeline.store.manifest import build_manifest, hash_check
from pipeline.store.packs import pack_shapes, parse_pack
from pipeline.store.publication import PackFile, Source
from pipeline.store.reader import Store, checksum
from pipeline.store.writer import StoreWriter


class UnitFetcher:
    """Commits units of a store from a publication; a counterpart of UnitWorker, which computes them."""

    def __init__(self, source: Source, store: StoreWriter, kind: str):
        self.source, self.store, self.kind = source, store, kind
        self._packs = {(pack.block, pack.array, pack.first): pack for pack in source.publication.packs}

    def compute(self, units: list[Unit]) -> None:
        """Download the packs with these units, and commit the units, pack by pack.

        Raises:
            Damaged: a pack is missing or damaged.
            Unreadable: the server does not answer.
        """
        chosen = sorted(units, key=lambda unit: (unit.block, unit.shard))
        with progress(len(units), "store fetch", "unit") as bar:
            for pack, group in groupby(chosen, self._pack):
                members = list(group)
                self._commit(pack, members)
                bar.update(len(members))

    def _pack(self, unit: Unit) -> PackFile:
        """The pack that holds a unit's argmax."""
        for pack in self.source.publication.packs:
            if (pack.array, pack.block) == ("argmax", unit.block) and pack.first <= unit.shard <= pack.last:
                return pack
        raise self._damaged(f"block {unit.block} of shard {unit.shard}", "no pack that holds it")

    def _commit(self, pack: PackFile, units: list[Unit]) -> None:
        arrays = self._read(pack, "argmax")
        payloads = self._read(pack, self.kind) if self.kind != "argmax" else {}
        for unit in units:
            buffers = {"argmax": arrays[unit.shard]["argmax"], **payloads.get(unit.shard, {})}
            checks = arrays[unit.shard]["check"]
            if found := self._invalid(unit, buffers, checks):
                raise self._damaged(f"{pack.name}: shard {self.store.index.names[unit.shard]}", found)
            # an argmax that is there already belongs to another kind, whose runs and manifests are named after it
            if self.store.has_argmax(unit) and not self.store.has_argmax(unit, buffers["argmax"]):
                raise _others(self.store, self.source, self.store.index.names[unit.shard])
            self.store.write_unit(unit, buffers, checks)

    def _invalid(self, unit: Unit, buffers: dict[str, np.ndarray], checks: np.ndarray) -> str:
        """Why predictions are not those of a unit, though the pack is as published; empty if they are."""
        store, name = self.store, self.store.index.names[unit.shard]
        check = np.full((store.recipe.block, store.groups + len(store.kinds)), NO_CHECK, np.uint64)
        check[:, : checks.shape[1]] = checks
        for kind, values in buffers.items():
            check[:, store.checksum_slot(kind)] = [checksum(view) for view in values]
        if hash_check(store, check, self.kind) != self.source.publication.units[self.kind][name][unit.block]:
            return "predictions that are not those of this unit in manifest.json"
        named, k = {"argmax", "topk", "sampled"} & buffers.keys(), self.source.publication.k
        classes = [buffers[kind][..., :k] if kind != "argmax" else buffers[kind] for kind in named]
        if any((numbers >= store.classes).any() for numbers in classes):
            return f"a class that is not one of the {store.classes:,}"
        return ""

    def _read(self, pack: PackFile, kind: str):
        file = self._packs.get((pack.block, kind, pack.first))
        if file is None:
            raise self._damaged(pack.name, f"no pack of the same shards as {kind}")
        filled = [shard for shard in range(file.first, file.last + 1) if self.store.index.samples[shard]]
        shapes = pack_shapes(self.store, filled, kind, self.source.publication.width)
        try:
            return parse_pack(self.source.read(file), shapes)
        except ValueError as error:
            raise self._damaged(file.name, str(error)) from error

    def _damaged(self, name: str, found: str) -> Damaged:
        return Damaged(
            f"{self.source.where}: {name}", expected="a pack as published", found=found, do="ask the publisher to publish it again"
        )


def check_as_published(store: Store, source: Source, spec: StoreSpec) -> None:
    """Compare the hashes of a complete store's units with the published ones.

    Raises:
        PipelineError: the store has different predictions, computed locally for example.
    """
    published = source.publication.units[spec.kind]
    for shard, hashes in build_manifest(store, spec.views, spec.kind)["units"].items():
        if hashes != published.get(shard, [])[: spec.blocks]:
            raise _others(store, source, shard)


def _others(store: Store, source: Source, shard: str) -> PipelineError:
    return PipelineError(
        f"{store.path}: the predictions for shard {shard}",
        expected=f"those published at {source.where}", found="different ones: they were computed locally, or are damaged",
        do="move the store away and fetch again; or remove teacher_logits.fetch (finetune.fetch) to keep your own",
    )  # fmt: skip
