"""The store at ImageNet's size: seconds and memory to create, write, open, list and read it.

A made-up index of 1,281,167 rows in 1,024 shards (no images, no shards: nothing here reads any), a store
of 300 views as argmax. Block 0 of every shard is written with random answers, a tenth of all units; the
rest is arithmetic. Each step runs `--rounds` times in fresh processes (making and writing once). Memory
is a process's greatest resident set less what is resident after its imports; the imports are shown by
themselves. What is read was written just before: it comes from the page cache.

\b
* index: write_index; the memory is that of the made-up rows too;
* create: Index, StoreWriter.create;
* write: StoreWriter.write_unit of block 0, then every file and folder synced;
* train: Index, Store.open, Plan, the first step's items and members: what a student's run waits for;
* read: the same, then Store.read of `--reads` items in the plan's order;
* missing: Store.missing as after block 0, and with (empty) files for all other units beside;
* manifest: audit.manifest of block 0, which a student's run computes of the whole store when it starts.

\b
    python bench/scale.py
    python bench/scale.py --rows 5000 --shards 4 --views 60
"""

import collections
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# of the pipeline nothing: a process starts with its parent's greatest resident set
import click
from machine import conditions, filesystem, spread

BLOCK, CLASSES, TOP_K = 30, 1000, 10


@dataclass(frozen=True)
class Scale:
    """What every step is told."""

    root: Path
    rows: int
    shards: int
    views: int
    reads: int

    @property
    def index(self) -> Path:
        return self.root / "index.json"

    @property
    def store(self) -> str:
        return str(self.root / "store.zarr")

    @property
    def blocks(self) -> int:
        return self.views // BLOCK


@dataclass
class Measured:
    """One run of a step: MiB after the imports, MiB at most beyond them, seconds by part, other figures."""

    imports: float = 0.0
    beyond: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


class Clock:
    """Seconds by part: each from the last call to the next."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self.last = now - self.last, now

    def skip(self) -> None:
        self.last = time.perf_counter()


def run(step: Callable, scale: Scale) -> Measured:
    """A step, in this process, which must be fresh."""
    import torch


    torch.set_num_threads(1)
    imports = resident()
    clock = Clock()
    figures = step(scale, clock) or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Measured(imports, peak - imports, clock.seconds, figures)


def fresh(step: Callable, scale: Scale) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (step, scale))


def resident() -> float:
    """MiB resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


# the steps, each in a process of its own


def make_index(scale: Scale, clock: Clock) -> dict[str, float]:
    """Rows as ImageNet's: keys such as n01440764/n01440764_10026, sizes of a photograph's."""
    import numpy as np

    from pipeline.shards.index import ShardIndex, row_type
    from pipeline.shards.indexing import write_index

    rng, shards, first = np.random.default_rng(0), [], 0
    for number in range(scale.shards):
        samples = scale.rows // scale.shards + (number < scale.rows % scale.shards)
        rows = np.zeros(samples, row_type(25))
        labels = rng.integers(0, CLASSES, samples)
        rows["key"] = [f"n{label:08d}/n{label:08d}_{first + i}".encode() for i, label in enumerate(labels)]
        rows["size"] = rng.integers(20_000, 200_000, samples)
        rows["offset"] = np.cumsum(rows["size"] + 2048) - rows["size"]
        rows["label"], rows["crc32c"] = labels, rng.integers(0, 2**32, samples)
        shards.append(ShardIndex(f"{number:06d}.tar", rows, int(rows["offset"][-1] + rows["size"][-1]), f"{number:064x}"))
        first += samples
    clock.skip()
    write_index(scale.index, str(scale.root), [f"n{label:08d}" for label in range(CLASSES)], shards)
    clock("write_index")
    table = scale.index.with_suffix(".npy").stat().st_size
    return {"index.json, bytes": scale.index.stat().st_size, "index.npy, bytes": table}


def created(scale: Scale, clock: Clock):
    from pipeline.config.schema import Recipe
    from pipeline.shards.index import Index
    from pipeline.store.reader import StoreIdentity
    from pipeline.store.writer import StoreWriter

    index = Index(scale.index)
    clock("Index")
    identity = StoreIdentity(index.fingerprint, Recipe(block=BLOCK), {"model": "none"})
    store = StoreWriter.create(scale.store, identity, index, scale.views, "argmax", TOP_K, "float32")
    clock("StoreWriter.create")
    return store


def create(scale: Scale, clock: Clock) -> None:
    created(scale, clock)


def write(scale: Scale, clock: Clock) -> dict[str, float]:
    import numpy as np

    from pipeline.batches.plan import Unit
    from pipeline.views.draw import group_count

    store, rng, spent = created(scale, clock), np.random.default_rng(1), 0.0
    for shard, samples in enumerate(store.index.samples):
        argmax = rng.integers(0, CLASSES, (BLOCK, samples), np.uint16)
        checks = rng.integers(0, 2**63, (BLOCK, group_count(samples, store.recipe.group_size)), np.uint64)
        start = time.perf_counter()
        store.write_unit(Unit(shard, 0), {"argmax": argmax}, checks)
        spent += time.perf_counter() - start
    clock.skip()
    for path in [scale.root, *scale.root.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    clock("synced")
    clock.seconds["write_unit"] = spent
    written = len(store.index) * BLOCK
    return {"rows": written, "rows/s": written / spent, "rows/s, durable": written / (spent + clock.seconds["synced"])}


def opened(scale: Scale, clock: Clock):
    from pipeline.batches.plan import training_plan
    from pipeline.config.schema import Recipe, Student
    from pipeline.shards.index import Index
    from pipeline.store.reader import Store

    index = Index(scale.index)
    clock("Index")
    store = Store.open(scale.store, index, Recipe(block=BLOCK))
    clock("Store.open")
    plan = training_plan(index, store.recipe, Student(), scale.views)
    for item in plan.items(0):
        plan.members(item)
    clock("Plan, step 0")
    return store, plan


def train(scale: Scale, clock: Clock) -> None:
    opened(scale, clock)


def read(scale: Scale, clock: Clock) -> dict[str, float]:
    """Every (shard, block) is new once and then at hand, as long as its window of shards is open."""
    store, plan = opened(scale, clock)
    spent, seen = {True: [], False: []}, set()
    for number in range(min(scale.reads, plan.groups * BLOCK)):  # in block 0
        item = plan.item(number)
        start = time.perf_counter()
        answers = store.read(item.shard, item.view)
        answers.argmax[plan.members(item)]
        spent[item.shard in seen].append(time.perf_counter() - start)
        seen.add(item.shard)
    clock("reads")
    figures = {"items read": len(spent[True]) + len(spent[False]), "shards opened": len(seen)}
    for at_hand, what in ((False, "a shard's first"), (True, "further")):
        figures[f"ms of {what} item, median"] = 1e3 * statistics.median(spent[at_hand])
    return figures


def missing(scale: Scale, clock: Clock) -> dict[str, float]:
    from pipeline.config.schema import Recipe
    from pipeline.shards.index import Index
    from pipeline.store.reader import Store

    store = Store.open(scale.store, Index(scale.index), Recipe(block=BLOCK))
    clock.skip()
    lacking = store.missing(scale.views, "argmax")
    clock("Store.missing")
    return {"units missing": len(lacking)}


def manifest(scale: Scale, clock: Clock) -> None:
    from pipeline.config.schema import Recipe
    from pipeline.shards.index import Index
    from pipeline.store.manifest import build_manifest
    from pipeline.store.reader import Store

    store = Store.open(scale.store, Index(scale.index), Recipe(block=BLOCK))
    clock.skip()
    build_manifest(store, BLOCK, "argmax")
    clock("manifest, block 0")


# what is printed


def report(title: str, runs: list[Measured]) -> None:
    """A row a part, of all runs; the figures are the last run's."""
    parts = collections.defaultdict(list)
    for measured in runs:
        for part, seconds in measured.seconds.items():
            parts[part].append(seconds)
        if len(measured.seconds) > 1:
            parts["together"].append(sum(measured.seconds.values()))
    memory = [spread_of([getattr(measured, name) for measured in runs]) for name in ("imports", "beyond")]
    for number, (part, seconds) in enumerate(parts.items()):
        first = number == 0
        cells = [title if first else "", part, spread_of(seconds), *(memory if first else ["", ""])]
        print(f"| {' | '.join(cells)} |")
    for name, figure in runs[-1].figures.items():
        print(f"| | {name}: {figure:,.6g} | | | |" if figure < 1000 else f"| | {name}: {figure:,.0f} | | | |")


def spread_of(values: list[float]) -> str:
    return spread(values) if len(values) > 1 else f"{values[0]:.4g}"


def goals(runs: dict[str, list[Measured]]) -> None:
    print("\n| goal | | found | |\n| --- | ---: | ---: | --- |")
    start = statistics.median(sum(measured.seconds.values()) for measured in runs["train"])
    memory = max(measured.beyond for measured in runs["train"]) * 2**20 / 1e6
    listed = statistics.median(measured.seconds["Store.missing"] for measured in runs["missing, all files there"])
    for says, found, bound in (
        ("index, store, plan and first step, s", start, 1.0),
        ("the same, MB beyond the imports at most", memory, 200.0),
        ("missing, all files there, s", listed, 5.0),
    ):
        print(f"| {says} | at most {bound:g} | {found:.3g} | {'met' if found <= bound else '**not met**'} |")


def rest(scale: Scale, runs: dict[str, list[Measured]], block: tuple[int, int, int], views_per_second: float) -> None:
    """Arithmetic from block 0 to the whole store, of all kinds."""
    from pipeline.store.encoding import KINDS, row_bytes

    units, rows = scale.shards * scale.blocks, scale.rows * scale.views
    files, size, taken = block
    print(f"\n{scale.shards:,} shards x {scale.blocks} blocks = {units:,} units; {rows:,} rows.\n")
    print("| the whole store, as argmax | block 0, measured | all blocks, by arithmetic |\n| --- | ---: | ---: |")
    print(f"| files, without the arrays' metadata | {files:,} | {files * scale.blocks:,} |")
    for name, number in (("files", size), ("blocks on disk", taken)):
        a_row = number / (scale.rows * BLOCK)
        print(f"| MB, {name}; {a_row:.3f} bytes a row | {number / 1e6:,.1f} | {number * scale.blocks / 1e6:,.1f} |")
    speed = runs["write"][0].figures["rows/s, durable"]
    for name, rate in ((f"hours to write, at {speed:,.0f} rows/s", speed),
                       (f"hours of a teacher at {views_per_second:,.0f} views/s", views_per_second)):  # fmt: skip
        print(f"| {name} | {scale.rows * BLOCK / rate / 3600:.3f} | {rows / rate / 3600:.2f} |")
    seconds = statistics.median(measured.seconds["manifest, block 0"] for measured in runs["manifest"])
    print(f"| seconds of the manifest, at a run's start | {seconds:.2f} | {seconds * scale.blocks:.1f} |")
    print("\n| kind | bytes a row | GB, checks and metadata apart | files |\n| --- | ---: | ---: | ---: |")
    for kind in KINDS:
        width = row_bytes(kind, CLASSES, TOP_K)
        print(f"| {kind} | {width:,} | {width * rows / 1e9:,.1f} | {units * (2 + (kind != 'argmax')):,} |")


def written_block(store: Path) -> tuple[int, int, int]:
    """Files of block 0; their bytes; the disk's blocks that they and their folders take."""
    paths = [path for name in ("argmax", "check") for path in (store / name / "c" / "0").rglob("*")]
    stats = [(path.is_file(), path.stat()) for path in paths]
    files = [stat for is_file, stat in stats if is_file]
    return len(files), sum(stat.st_size for stat in files), sum(stat.st_blocks * 512 for _, stat in stats)


def fill_up(scale: Scale) -> None:
    """An empty file in place of every chunk that is not written: enough to be listed."""
    for name, last in (("argmax", ""), ("check", "/0")):
        for block in range(1, scale.blocks):
            for shard in range(scale.shards):
                path = Path(f"{scale.store}/{name}/c/{block}/{shard}{last}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


@click.command(help=__doc__)
@click.option("--rows", default=1_281_167, show_default=True)
@click.option("--shards", default=1024, show_default=True)
@click.option("--views", default=300, show_default=True, help=f"A multiple of {BLOCK}.")
@click.option("--reads", default=2000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--views-per-second", default=1000.0, show_default=True, help="The teacher's, for the hours.")
def main(rows: int, shards: int, views: int, reads: int, rounds: int, views_per_second: float):
    print(conditions())
    with tempfile.TemporaryDirectory() as root:
        scale, runs = Scale(Path(root), rows, shards, views, reads), {}
        print(f"* files on {filesystem(root)}; {rows:,} rows, {shards:,} shards, {views} views, block {BLOCK}")
        print("\n| step | | seconds | MiB after imports | MiB at most beyond |")
        print("| --- | --- | ---: | ---: | ---: |")

        def measure(title: str, step: Callable, times: int = rounds) -> None:
            runs[title] = [fresh(step, scale) for _ in range(times)]
            report(title, runs[title])

        measure("index", make_index, 1)
        measure("create", create, 1)
        measure("write", write, 1)
        block = written_block(Path(scale.store))
        measure("train", train)
        measure("read", read)
        measure("missing, after block 0", missing)
        measure("manifest", manifest)
        fill_up(scale)
        measure("missing, all files there", missing)
        goals(runs)
        rest(scale, runs, block, views_per_second)


if __name__ == "__main__":
    main()
