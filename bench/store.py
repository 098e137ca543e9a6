"""The store against raw memory maps of the same numbers.

50,000 rows in 50 shards of 1,000, random predictions of 1,000 classes, one block: a unit is 1,000 rows in `--block`
views. The recipe's 30 views are too many of the dense kinds for a benchmark, so every kind is measured at 3, and
argmax and topk also at `--narrow-block`.

ours: pipeline.store.reader.Store, which compares the CRC-32C and the checksum of all that it reads. memmap: argmax and
payload as `np.memmap`, nothing checked: the limit.

\b
* written: from nothing until every file and folder is synced, by the same function for all;
* then everything is compared with what was written, which fills the page cache;
* one view of a shard: the Store's cache is emptied before each;
* training order: pipeline.batches.plan's with 16 open shards, 16 groups per step; ours is `read_predictions`, as
  training calls it, which also compares the groups' checks and makes tensors.

Layouts take turns at every piece of work, in changing order; ratios are taken within a round.

\b
    python bench/store.py [--rounds 5]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts a thread pool

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from layouts import SAMPLES, SHARDS, Case, Layout, Mapped, Ours, make_index
from machine import conditions, disk_usage, filesystem, sync
from results import head, print_goals, ratios, rotated, row, spread

KINDS = ("argmax", "topk", "dense", "dense8")
NARROW = ("argmax", "topk")
LAYOUTS = {"ours": Ours, "memmap": Mapped}
Seconds = dict[str, list[float]]
"""By layout, one per round."""
Layouts = dict[str, Layout]


def take_turns(
    layouts: Layouts, jobs: list[tuple], turn: int, work: Callable, forget: bool = False
) -> dict[str, float]:
    """Seconds that each layout takes for all jobs; their order changes from job to job.

    With `forget`, a layout's Python caches are emptied before every job, outside the timing.
    """
    spent: dict[str, float] = dict.fromkeys(layouts, 0.0)
    for number, job in enumerate(jobs):
        for name in rotated(list(layouts), turn + number):
            if forget:
                layouts[name].forget()
            start = time.perf_counter()
            work(layouts[name], *job)
            spent[name] += time.perf_counter() - start
    return spent


def collect(rounds: list[dict[str, float]]) -> Seconds:
    return {name: [spent[name] for spent in rounds] for name in rounds[0]}


def write(root: Path, case: Case, rounds: int) -> tuple[Layouts, Seconds]:
    """Write everything from nothing in every round, until it is durable; the last round's stays."""

    def durably(layout: Layout) -> None:
        layout.write()
        sync(layout.folder)

    spent, layouts = [], {}
    for turn in range(rounds):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        sync(root)
        layouts = {name: layout(root / name, case) for name, layout in LAYOUTS.items()}
        spent.append(take_turns(layouts, [()], turn, durably))
    return layouts, collect(spent)


def compare(layouts: Layouts, case: Case) -> None:
    """Every layout must give what was written, bit for bit; this brings all files into the page cache."""
    for name, layout in layouts.items():
        wrong = [at for at in np.ndindex(SHARDS, case.views) if not layout.intact(*at)]
        assert not wrong, f"{name}: predictions read differ from those written, at (shard, view) {wrong[:3]}"


def one_view(layouts: Layouts, case: Case, turn: int) -> dict[str, float]:
    """One view of every shard."""
    views = np.random.default_rng(turn).integers(case.views, size=SHARDS)
    places = [(shard, int(view)) for shard, view in enumerate(views)]
    return take_turns(layouts, places, turn, lambda layout, *at: layout.view(*at), forget=True)


def training_order(layouts: Layouts, case: Case, turn: int) -> dict[str, float]:
    """One cycle: every group once, in three views each."""
    plan, in_cycle = case.plan, case.plan.groups * case.recipe.repeats
    items = [plan.item(number) for number in range(turn * in_cycle, (turn + 1) * in_cycle)]
    steps = [items[first : first + plan.batch_groups] for first in range(0, in_cycle, plan.batch_groups)]
    jobs = [(step, [plan.members(item) for item in step]) for step in steps]
    for layout in layouts.values():
        layout.forget()
    return take_turns(layouts, jobs, turn, lambda layout, *step: layout.step(*step))


def measure(root: Path, case: Case, rounds: int, writes: int) -> dict[Callable, Seconds]:
    """Seconds by operation."""
    layouts, written = write(root, case, writes)
    for layout in layouts.values():
        layout.open()
    compare(layouts, case)
    found = {operation: [] for operation in (one_view, training_order)}
    for turn in range(rounds + 1):
        for operation, spent in found.items():
            spent.append(operation(layouts, case, turn))
    # the first round warms up
    return {write: written} | {operation: collect(spent[1:]) for operation, spent in found.items()}


FIGURES: dict[Callable, tuple[str, Callable[[float, Case], float]]] = {  # an operation's title; seconds to its figure
    write: ("written until durable, million rows/s", lambda s, case: case.rows / s / 1e6),
    one_view: ("one view of a shard, ms", lambda s, case: s * 1e3 / SHARDS),
    training_order: ("training order, us per sample", lambda s, case: s * 1e6 / (SHARDS * SAMPLES * case.recipe.repeats)),
}


def figures(operation: Callable, seconds: list[float], case: Case) -> list[float]:
    return [FIGURES[operation][1](s, case) for s in seconds]


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of all files of a folder, and of the disk blocks that they take."""
    return disk_usage([folder, *folder.rglob("*")])[1:]


def report(root: Path, case: Case, found: dict[Callable, Seconds]) -> None:
    print(f"\n## {case.kind}, units of {SAMPLES:,} rows x {case.views} views: {case.rows / 1e6:.2f} million rows\n")
    head("", *LAYOUTS, "times as fast as memmap")
    for operation, spent in found.items():
        cells = [spread(figures(operation, spent[name], case)) for name in LAYOUTS]
        row(FIGURES[operation][0], *cells, spread(ratios(spent["memmap"], spent["ours"])))
    for number, title in enumerate(("bytes per row, all files", "bytes per row, blocks on disk")):
        row(title, *(f"{sizes(root / name)[number] / case.rows:.3f}" for name in LAYOUTS), "")


def goals(root: Path, case: Case, found: dict[Callable, Seconds]) -> None:
    """The goals of a case, checked on medians."""
    medians = {
        operation: statistics.median(figures(operation, spent["ours"], case)) for operation, spent in found.items()
    }
    rows = [("training order, % of the time at 1,000 views/s", "at most", 0.5, medians[training_order] / 10)]
    if case.kind == "argmax":
        rows.append((FIGURES[one_view][0], "at most", 0.6, medians[one_view]))
        for path, what, bound in ((".", "everything", 2.6), ("argmax", "argmax alone", 2.2)):
            for taken, unit in zip(sizes(root / "ours" / path), ("files", "blocks on disk"), strict=True):
                rows.append((f"bytes per row, {what}, {unit}", "at most", bound, taken / case.rows))
    print_goals(rows)


@click.command(help=__doc__)
@click.option("--block", default=3, show_default=True, help="Views per unit, for every kind; a multiple of 3.")
@click.option("--narrow-block", "narrow", default=30, show_default=True, help="The same again for argmax and topk.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--write-rounds", "writes", default=3, show_default=True)
def main(block: int, narrow: int, rounds: int, writes: int):
    torch.set_num_threads(1)
    kinds = [(kind, block) for kind in KINDS] + [(kind, narrow) for kind in NARROW if narrow != block]
    print(conditions())
    with tempfile.TemporaryDirectory() as temporary:
        print(f"* files on {filesystem(temporary)}; {rounds} rounds of reading, {writes} of writing")
        index = make_index(Path(temporary))
        for kind, views in kinds:
            case, root = Case(index, kind, views), Path(temporary) / "case"
            found = measure(root, case, rounds, writes)
            report(root, case, found)
            goals(root, case, found)


if __name__ == "__main__":
    main()
