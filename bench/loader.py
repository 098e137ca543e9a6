"""The loader alone: views a second with 1 and 2 workers, for slices of 1, 2, 4 and 16 groups, and memory.

Shards of 256 images are made from the folder's images (each stands several times) in a temporary
folder. A slice is what one worker renders at a time; copies of repeated augmentation (3) share a
decoding inside it. No training step runs beside. Memory: the greatest resident set of a process that
renders groups from all over 1 and 100 shards of 1,252 rows.

    python bench/loader.py FOLDER_OF_JPEGS [--rounds 3]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts a thread pool

import collections
import dataclasses
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import click
import torch
from machine import conditions, spread

from pipeline.batches.batch import Renderer
from pipeline.batches.loader import step_loader
from pipeline.batches.plan import Plan
from pipeline.config.schema import Recipe
from pipeline.shards.index import Index
from pipeline.shards.indexing import index_shard, write_index, write_shard

RECIPE = Recipe()
GROUPS = 16
SLICES = (1, 2, 4, 16)
CYCLES = 4


def build(root: Path, images: list[bytes], shards: int, samples: int, links: bool = False) -> Index:
    """An index over `shards` shards of `samples` images each; with `links`, all are the same tar."""
    root.mkdir()
    indexed = []
    for shard in range(shards):
        path = root / f"{shard:04d}.tar"
        if links and shard:
            path.symlink_to(root / "0000.tar")
            indexed.append(dataclasses.replace(indexed[0], name=path.name))
        else:
            numbers = range(shard * samples, (shard + 1) * samples)
            write_shard(path, ((f"n{n:08d}", "jpg", images[n % len(images)], 0) for n in numbers))
            indexed.append(index_shard(str(root), path.name))
    write_index(root / "index.json", str(root), ["0"], indexed)
    return Index(root / "index.json")


def plan(index: Index, groups: int) -> Plan:
    return Plan(RECIPE, tuple(index.names), tuple(map(int, index.samples)), RECIPE.block, groups)


def measure(index: Index, groups: int, workers: int) -> tuple[float, float]:
    """(views a second, views a decoding) over CYCLES cycles: every group, three views each."""
    steps = CYCLES * RECIPE.repeats * GROUPS // groups
    batches = iter(step_loader(plan(index, groups), index, range(steps), range(1), 1, workers, pin=False))
    seen = decodes = 0
    for number, batch in enumerate(batches, 1):
        if number == workers:  # all have started and are at work on their next
            before, start = seen + int(batch.weights.sum()), time.perf_counter()
        seen += int(batch.weights.sum())
        decodes += batch.decodes
    return (seen - before) / (time.perf_counter() - start), seen / decodes


def speeds(index: Index, rounds: int) -> None:
    rates, shared = collections.defaultdict(list), {}
    for _ in range(rounds):
        for groups in SLICES:
            for workers in (1, 2):
                rate, shared[groups, workers] = measure(index, groups, workers)
                rates[groups, workers].append(rate)
    columns = "slice, groups | views a decoding, 1 and 2 workers | views/s, 1 worker | 2 workers"
    print(f"\n| {columns} | ratio, {rounds} rounds |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for groups in SLICES:
        one, two = rates[groups, 1], rates[groups, 2]
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        sharing = f"{shared[groups, 1]:.2f}, {shared[groups, 2]:.2f}"
        print(f"| {groups} | {sharing} | {spread(one)} | {spread(two)} | {spread(ratios)} |")


def peak(path: str, items: int) -> float:
    """MiB at most resident in this process after so many items spread over all shards."""
    torch.set_num_threads(1)
    index = Index(path)
    renderer, order = Renderer(index, RECIPE), plan(index, 1)
    for number in range(items):
        renderer.render([order.item(number * (order.groups * RECIPE.repeats // items))])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(root: Path, images: list[bytes]) -> None:
    """Each in a fresh process of its own."""
    print("\n| shards | rows | greatest resident set, MiB |\n| ---: | ---: | ---: |")
    for shards in (1, 100):
        index = build(root / f"memory{shards}", images, shards, 1252, links=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(peak, (index.path, 60))
        print(f"| {shards} | {len(index):,} | {found:.0f} |")


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=3, show_default=True)
def main(folder: Path, rounds: int):
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise click.UsageError(f"{folder}: no .jpg or .jpeg below it")
    images = [path.read_bytes() for path in files[:250]]
    print(conditions())
    with tempfile.TemporaryDirectory() as root:
        memory(Path(root), images)
        speeds(build(Path(root) / "speed", images, GROUPS // 4, 256), rounds)


if __name__ == "__main__":
    main()
