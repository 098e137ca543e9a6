"""The store at ImageNet's size: seconds and memory to write, open, list and publish it.

An imaginary index of 1,281,167 rows in 1,024 shards (no step reads an image), a store of 300 views as argmax. Block 0
of every shard is written with random predictions, a tenth of all units; the rest is arithmetic. Each step runs
`--rounds` times in fresh processes (index and write once). Memory is a process's greatest resident set beyond what is
resident after its imports. What is read was just written: it comes from the page cache.

\b
* index: write_index; the memory is that of the imaginary rows too;
* write: StoreWriter.create, write_unit of block 0, then every file and folder synced;
* train: Index, Store.open, Plan, the first step's items and members: what a student's run waits for;
* missing: Store.missing after block 0, and with (empty) files for all other units as well;
* manifest: build_manifest of block 0, which a student's run computes for the entire store when it starts.

\b
    python bench/scale.py
    python bench/scale.py --rows 5000 --shards 4 --views 60
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# nothing from the pipeline: a process starts with its parent's greatest resident set
import click
from machine import conditions, disk_usage, filesystem, sync
from results import head, print_goals, row, spread

if TYPE_CHECKING:
    from pipeline.store.reader import Store

BLOCK, CLASSES, TOP_K = 30, 1000, 10


@dataclass(frozen=True)
class Scale:
    """The settings of every step."""

    root: Path
    rows: int
    shards: int
    views: int

    @property
    def index(self) -> Path:
        return self.root / "index.json"

    @property
    def store(self) -> str:
        return str(self.root / "store.zarr")


class Clock:
    """Seconds by part, each from the previous call to its own."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self.last = now - self.last, now

    def skip(self) -> None:
        self.last = time.perf_counter()


def run(step: Callable, scale: Scale) -> tuple[dict[str, float], float]:
    """Run a step in this process, which must be fresh: its seconds by part, and MiB beyond the imports, at most."""
    import torch

    import pipeline.batches.loader
    import pipeline.store.manifest  # noqa: F401  training has all of these

    torch.set_num_threads(1)
    imports = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    clock = Clock()
    step(scale, clock)
    return clock.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - imports


# the steps, each in a process of its own


def make_index(scale: Scale, clock: Clock) -> None:
    from experiment import imaginary_shards

    from pipeline.shards.indexing import write_index

    samples = [scale.rows // scale.shards + (number < scale.rows % scale.shards) for number in range(scale.shards)]
    shards = imaginary_shards(samples, CLASSES)
    clock.skip()
    write_index(scale.index, str(scale.root), [f"n{label:08d}" for label in range(CLASSES)], shards)
    clock("write_index")


def write(scale: Scale, clock: Clock) -> None:
    import numpy as np

    from pipeline.batches.plan import Unit
    from pipeline.config.schema import Recipe
    from pipeline.shards.index import Index
    from pipeline.store.reader import StoreIdentity
    from pipeline.store.writer import StoreWriter
    from pipeline.views.draw import group_count

    index = Index(scale.index)
    identity = StoreIdentity(index.fingerprint, Recipe(block=BLOCK), {"model": "none"})
    clock.skip()
    store = StoreWriter.create(scale.store, identity, index, scale.views, "argmax", TOP_K, "float32")
    clock("StoreWriter.create")
    rng, spent = np.random.default_rng(1), 0.0
    for shard, samples in enumerate(index.samples):
        argmax = rng.integers(0, CLASSES, (BLOCK, samples), np.uint16)
        checks = rng.integers(0, 2**63, (BLOCK, group_count(samples, store.recipe.group_size)), np.uint64)
        start = time.perf_counter()
        store.write_unit(Unit(shard, 0), {"argmax": argmax}, checks)
        spent += time.perf_counter() - start
    clock.seconds["write_unit"] = spent
    clock.skip()
    sync(scale.root)
    clock("synced")


def opened(scale: Scale, clock: Clock) -> "Store":
    from pipeline.config.schema import Recipe
    from pipeline.shards.index import Index
    from pipeline.store.reader import Store

    index = Index(scale.index)
    clock("Index")
    store = Store.open(scale.store, index, Recipe(block=BLOCK))
    clock("Store.open")
    return store


def train(scale: Scale, clock: Clock) -> None:
    from pipeline.batches.plan import training_plan
    from pipeline.config.schema import Student

    store = opened(scale, clock)
    plan = training_plan(store.index, store.recipe, Student(), scale.views)
    for item in plan.items(0):
        plan.members(item)
    clock("Plan, step 0")


def missing(scale: Scale, clock: Clock) -> None:
    store = opened(scale, Clock())
    clock.skip()
    store.missing(scale.views, "argmax")
    clock("Store.missing")


def manifest(scale: Scale, clock: Clock) -> None:
    from pipeline.store.manifest import build_manifest

    store = opened(scale, Clock())
    clock.skip()
    build_manifest(store, BLOCK, "argmax")
    clock("manifest, block 0")


# what is printed


def measure(title: str, step: Callable, scale: Scale, rounds: int) -> tuple[dict[str, float], float]:
    """Run a step in fresh processes and print a row per part. Returns the medians of seconds, and the most MiB."""
    runs = []
    for _ in range(rounds):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            runs.append(pool.apply(run, (step, scale)))
    parts = {part: [seconds[part] for seconds, _ in runs] for part in runs[0][0]}
    if len(parts) > 1:
        parts["together"] = [sum(seconds.values()) for seconds, _ in runs]
    memory = [beyond for _, beyond in runs]
    for number, (part, seconds) in enumerate(parts.items()):
        row("" if number else title, part, spread(seconds), "" if number else spread(memory))
    return {part: statistics.median(seconds) for part, seconds in parts.items()}, max(memory)


def extrapolate(scale: Scale, block: tuple[int, int, int], durable: float, manifest: float) -> None:
    """From block 0 to the entire store, by arithmetic."""
    blocks, rows = scale.views // BLOCK, scale.rows * BLOCK
    files, size, taken = block
    print(f"\n{scale.shards:,} shards x {blocks} blocks = {scale.shards * blocks:,} units; {rows * blocks:,} rows.\n")
    head("the entire store, as argmax", "block 0, measured", "all blocks, by arithmetic")
    row("files, without the arrays' metadata", f"{files:,}", f"{files * blocks:,}")
    for name, number in (("files", size), ("blocks on disk", taken)):
        row(f"MB, {name}; {number / rows:.3f} bytes per row", f"{number / 1e6:,.1f}", f"{number * blocks / 1e6:,.1f}")
    row(f"hours to write, at {rows / durable:,.0f} rows/s", f"{durable / 3600:.3f}", f"{durable * blocks / 3600:.2f}")
    row("seconds of the manifest, at a run's start", f"{manifest:.2f}", f"{manifest * blocks:.1f}")


def fill_up(scale: Scale) -> None:
    """Put an empty file in place of every chunk that is not written: enough to be listed."""
    for name, last in (("argmax", ""), ("check", "/0")):
        for block in range(1, scale.views // BLOCK):
            for shard in range(scale.shards):
                path = Path(f"{scale.store}/{name}/c/{block}/{shard}{last}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


@click.command(help=__doc__)
@click.option("--rows", default=1_281_167, show_default=True)
@click.option("--shards", default=1024, show_default=True)
@click.option("--views", default=300, show_default=True, help=f"A multiple of {BLOCK}.")
@click.option("--rounds", default=3, show_default=True)
def main(rows: int, shards: int, views: int, rounds: int):
    print(conditions())
    with tempfile.TemporaryDirectory() as root:
        scale = Scale(Path(root), rows, shards, views)
        print(f"* files on {filesystem(root)}; {rows:,} rows, {shards:,} shards, {views} views, block {BLOCK}\n")
        head("step", "part", "seconds", "MiB beyond the imports")
        measure("index", make_index, scale, 1)
        written, _ = measure("write", write, scale, 1)
        block = disk_usage(path for name in ("argmax", "check") for path in Path(scale.store, name, "c", "0").rglob("*"))
        started, memory = measure("train", train, scale, rounds)
        measure("missing, after block 0", missing, scale, rounds)
        published, _ = measure("manifest", manifest, scale, rounds)
        fill_up(scale)
        listed, _ = measure("missing, all files exist", missing, scale, rounds)
    print_goals([
        ("index, store, plan and first step, s", "at most", 1.0, started["together"]),
        ("the same, MB beyond the imports", "at most", 200.0, memory * 2**20 / 1e6),
        ("missing, all files exist, s", "at most", 5.0, listed["Store.missing"]),
    ])  # fmt: skip
    extrapolate(scale, block, written["write_unit"] + written["synced"], published["manifest, block 0"])


if __name__ == "__main__":
    main()
