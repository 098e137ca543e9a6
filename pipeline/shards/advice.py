"""Warn about shards whose sizes waste computation or whose order mixes samples poorly."""

from collections import Counter

import numpy as np

from pipeline.shards.adjacent import COUNTS, read_sample_counts
from pipeline.shards.index import Index
from pipeline.shards.index_file import UNLABELLED

PADDING, SORTED = 0.01, 0.2  # thresholds of the warnings


def report_padding(total: int, shards: int, group: int) -> None:
    """Print the share of unused slots in each forward pass, and a better shard size if it is high and there is one."""
    wasted = padding(total, shards, group)
    print(f"train: groups of {group} samples: {wasted:.2%} of the slots in each forward pass are unused")
    best = min(range(max(1, shards // 2), 2 * shards + 1), key=lambda n: (padding(total, n, group), abs(n - shards)))
    if wasted > PADDING and padding(total, best, group) < wasted / 2:
        size = -(-total // best)
        print(f"train: warning: data.shard_samples={size} would make that {padding(total, best, group):.2%}")


def padding(total: int, shards: int, group: int) -> float:
    """The share of the slots of all groups that hold no sample, where samples are spread evenly over shards."""
    least, more = divmod(total, shards)
    groups = more * -(-(least + 1) // group) + (shards - more) * -(-least // group)
    return 1 - total / (groups * group)


def report_order(index: Index, group: int) -> None:
    """Print the share of unused slots of existing shards; warn if it is high, or if they seem sorted by class."""
    wasted = 1 - len(index) / (group * int((-(-index.samples // group)).sum()))
    print(f"train: groups of {group} samples: {wasted:.2%} of the slots in each forward pass are unused")
    if wasted > PADDING:
        print(f"train: warning: shards of a multiple of {group} samples, or slightly fewer, would waste nothing")
    if (excess := sortedness(index)) > SORTED:
        print(
            f"train: warning: the shards seem to be sorted by class ({excess:.0%}): samples are mixed and trained on"
            " with others of their shard. Write them again, shuffled: for example with data.source=folder"
        )


def report_counts(split: str, index: Index) -> None:
    """Warn about shards that do not have as many samples as the `_info.json` next to them says."""
    counts = read_sample_counts(index.location)
    refused = Counter(image["shard"] for image in index.refused)
    found = {name: int(count) + refused[name] for name, count in zip(index.names, index.samples, strict=True)}
    if wrong := [name for name in index.names if counts.get(name, found[name]) != found[name]]:
        name = wrong[0]
        print(
            f"{split}: warning: {COUNTS} has a different number of samples for {len(wrong)} of {len(found)} shards:"
            f" {counts[name]:,} for {name}, which has {found[name]:,}"
        )


def sortedness(index: Index) -> float:
    """0 if samples of one shard share a class no more often than any two samples; 1 if every shard holds one class."""
    labels, starts = index.labels(), index.starts

    def same_class(some: np.ndarray) -> float:
        """Ordered pairs of different samples that are of one class."""
        counts = np.bincount(some - UNLABELLED)  # images without a label count as a class
        return float((counts * (counts - 1)).sum())

    pairs = float((index.samples * (index.samples - 1)).sum())
    anywhere = same_class(labels) / max(len(labels) * (len(labels) - 1), 1)
    if not pairs or anywhere == 1:
        return 0.0
    inside = sum(same_class(labels[starts[n] : starts[n + 1]]) for n in range(len(index.names))) / pairs
    return (inside - anywhere) / (1 - anywhere)
