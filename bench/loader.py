"""The loader alone: views per second with 1 and 2 workers, for slices of 1, 2, 4 and 16 groups.

Shards of 256 images are made from the folder's images (each is used several times) in a temporary
folder. A slice is what one worker renders at a time; the 3 copies of repeated augmentation share a
decode within it. No training step runs at the same time.

    python bench/loader.py FOLDER_OF_JPEGS [--rounds 3]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts a thread pool

import collections
import tempfile
import time
from pathlib import Path

import click
from experiment import make_index, read_jpegs
from machine import conditions
from results import head, ratios, row, spread

from pipeline.batches.loader import step_loader
from pipeline.batches.plan import training_plan
from pipeline.config.schema import Recipe, Student
from pipeline.shards.index import Index

RECIPE = Recipe()
GROUPS = 16
SLICES = (1, 2, 4, 16)
CYCLES = 4


def measure(index: Index, groups: int, workers: int) -> tuple[float, float]:
    """(views per second, views per decode) over CYCLES cycles: every group, three views each."""
    steps = CYCLES * RECIPE.repeats * GROUPS // groups
    plan = training_plan(index, RECIPE, Student(batch_size=groups * RECIPE.group_size), RECIPE.block)
    batches = iter(step_loader(plan, index, range(steps), range(1), 1, workers, pin=False))
    seen = decodes = before = 0
    start = 0.0
    for number, batch in enumerate(batches, 1):
        seen += batch.views
        decodes += batch.decodes
        if number == workers:  # all have started and are at work on their next
            before, start = seen, time.perf_counter()
    return (seen - before) / (time.perf_counter() - start), seen / decodes


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=3, show_default=True)
def main(folder: Path, rounds: int):
    images = read_jpegs(folder, 250)
    print(conditions() + "\n")
    rates, shared = collections.defaultdict(list), {}
    with tempfile.TemporaryDirectory() as root:
        index = make_index(Path(root) / "shards", images, [256] * (GROUPS // 4), 1)
        for _ in range(rounds):
            for groups in SLICES:
                for workers in (1, 2):
                    rate, shared[groups, workers] = measure(index, groups, workers)
                    rates[groups, workers].append(rate)
    views_per_decode = "views per decode, 1 and 2 workers"
    head("slice, groups", views_per_decode, "views/s, 1 worker", "2 workers", f"ratio, {rounds} rounds")
    for groups in SLICES:
        one, two = rates[groups, 1], rates[groups, 2]
        sharing = f"{shared[groups, 1]:.2f}, {shared[groups, 2]:.2f}"
        row(f"{groups}", sharing, spread(one), spread(two), spread(ratios(two, one)))


if __name__ == "__main__":
    main()
