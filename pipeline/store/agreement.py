"""How confident the teacher is in each view, how often it agrees with the label, and with itself across an image's views."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.batches.plan import Item, Unit, group_members
from pipeline.common.progress import progress
from pipeline.config.store_spec import StoreSpec
from pipeline.shards.index_file import UNLABELLED
from pipeline.store.encoding import decode_logits
from pipeline.store.kinds import KINDS, NO_CLASS
from pipeline.store.manifest import require_complete
from pipeline.store.reader import Store
from pipeline.views.draw import draw_mix, group_count

ROWS = 4096
"""Rows whose logits are decoded at once."""


@dataclass(frozen=True)
class Mean:
    """The mean of a quantity over the (image, view) pairs that have it, for each of V views."""

    counts: np.ndarray
    """int64 (V,): images."""
    sums: np.ndarray
    """float64 (V,)"""

    @property
    def per_view(self) -> np.ndarray:
        """float64 (V,); NaN where no image counts."""
        return self.sums / np.where(self.counts > 0, self.counts, np.nan)

    @property
    def overall(self) -> float:
        """Over all views; NaN if nothing counts."""
        return float(self.sums.sum() / self.counts.sum()) if self.counts.any() else float("nan")


Agreement = dict[str, Mean]
"""By quantity, as named in QUANTITIES; without confidence for a kind that has none."""

QUANTITIES = {
    "label": "teacher's class is the label",
    "label, not mixed": "the same, views that are not mixed",
    "most frequent": "teacher's class is its most frequent one for the image",
    "confidence": "probability of the teacher's class",
    "confidence, not mixed": "the same, views that are not mixed",
}
"""The label of a mixed view is that of the image with the larger share. The most frequent class is that of the views in
which the image has the larger share, and only these views count."""


def measure_agreement(store: Store, spec: StoreSpec) -> Agreement:
    """Measure every quantity over the configured views, one shard at a time; every checksum is compared.

    Images without a label do not count for `label`.

    Raises:
        PipelineError: a unit is missing or damaged.
    """
    require_complete(store, spec.views, spec.kind)
    sums = {name: (np.zeros(spec.views, np.int64), np.zeros(spec.views)) for name in QUANTITIES}
    shards = [shard for shard, samples in enumerate(store.index.samples) if samples]
    with progress(len(shards), "reading the store", "shard") as bar:
        for shard in shards:
            for name, (counted, values) in _measure_shard(store, spec, shard).items():
                sums[name][0][:] += counted.sum(1)
                sums[name][1][:] += np.where(counted, values, 0).sum(1, dtype=np.float64)
            bar.update()
    has_confidence = KINDS[spec.kind].has_logits
    return {name: Mean(*found) for name, found in sums.items() if has_confidence or not name.startswith("confidence")}


def _measure_shard(store: Store, spec: StoreSpec, shard: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each quantity, which (view, row) count, bool (V, N), and the values, (V, N)."""
    mixing = read_mixing(store, spec, shard)
    argmax = np.concatenate([store.read_unit(Unit(shard, block)) for block in range(spec.blocks)])
    labels = store.index.rows(shard)["label"]
    main = np.take(labels, mixing.main)
    own = mixing.main == np.arange(len(labels))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "label": (main != UNLABELLED, argmax == main),
        "label, not mixed": (mixing.unmixed & (main != UNLABELLED), argmax == main),
        "most frequent": (own, argmax == most_frequent(np.where(own, argmax, NO_CLASS))),
    }
    if KINDS[spec.kind].has_logits:
        confidence = np.stack([_confidence(store, spec, shard, view, argmax[view]) for view in range(spec.views)])
        everywhere = np.ones_like(mixing.unmixed)
        found |= {"confidence": (everywhere, confidence), "confidence, not mixed": (mixing.unmixed, confidence)}
    return found


@dataclass(frozen=True)
class ShardMixing:
    """How every view of a shard is mixed: V views, N samples."""

    main: np.ndarray
    """int64 (V, N): the position of the image with the larger share of a sample's view; its own if both are equal."""
    unmixed: np.ndarray
    """bool (V, N): whether the view shows the sample's image alone."""


def read_mixing(store: Store, spec: StoreSpec, shard: int) -> ShardMixing:
    """Draw again how a shard's views are mixed."""
    names, samples, recipe = tuple(store.index.names), tuple(int(each) for each in store.index.samples), spec.recipe
    main = np.tile(np.arange(samples[shard]), (spec.views, 1))
    unmixed = np.ones(main.shape, bool)
    for view in range(spec.views):
        for group in range(group_count(samples[shard], recipe.group_size)):
            members = group_members(recipe, names, samples, Item(shard, group, view))
            mix = draw_mix(recipe, names[shard], group, view, len(members))
            partners = members[mix.partner[: len(members)]]
            unmixed[view, members] = (partners == members) | (mix.lam == 1)
            if mix.lam < 0.5:
                main[view, members] = partners
    return ShardMixing(main, unmixed)


def most_frequent(classes: np.ndarray) -> np.ndarray:
    """The class that each column of (V, N) classes has most often, the smallest if several are as frequent; NO_CLASS counts
    for nothing, and stands where there is nothing else.
    """
    ordered = np.sort(classes, axis=0)
    places = np.arange(len(ordered))[:, None]
    begins = np.ones(ordered.shape, bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    lengths = places - np.maximum.accumulate(np.where(begins, places, 0), axis=0)
    lengths[ordered == NO_CLASS] = -1
    return np.take_along_axis(ordered, lengths.argmax(0)[None], axis=0)[0]


def _confidence(store: Store, spec: StoreSpec, shard: int, view: int, argmax: np.ndarray) -> np.ndarray:
    """The teacher's probability of its class, at temperature 1, float32 (N,)."""
    payload: Any = store.read(shard, view, spec.kind).payload
    parts = []
    for first in range(0, len(argmax), ROWS):
        rows = slice(first, first + ROWS)
        logits = decode_logits(spec.kind, torch.from_numpy(payload[rows].copy()), store.classes)
        classes = torch.from_numpy(argmax[rows].astype(np.int64))
        parts.append(logits.softmax(1).gather(1, classes[:, None])[:, 0].numpy())
    return np.concatenate(parts)
