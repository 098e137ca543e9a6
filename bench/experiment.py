"""What the benchmarks make up instead of reading it: photographs, a data set, rendered steps, a store.

Photographs are noise of several scales; labels and predictions are random. Everything else is real: the shards and
their index, the rendering, and the groups' checks, which the store holds and training compares.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs where the project is not installed

import click
import cv2
import numpy as np

from pipeline.batches.batch import Batch
from pipeline.batches.loader import step_loader
from pipeline.batches.plan import Plan
from pipeline.config.schema import Recipe
from pipeline.shards.index import Index
from pipeline.shards.index_file import ShardIndex, row_type
from pipeline.shards.indexing import index_shard, write_index, write_shard
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.writer import StoreWriter
from pipeline.views.draw import group_count

# the models with --tiny: seconds on one core
TINY_STUDENT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_TEACHER = "regnety_002"


def read_jpegs(folder: Path, count: int) -> list[bytes]:
    """At most `count` JPEGs, spread evenly over those below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise click.UsageError(f"{folder}: no .jpg or .jpeg below it")
    return [path.read_bytes() for path in files[:: max(1, len(files) // count)][:count]]


def photographs(count: int, width: int = 500, height: int = 375) -> list[bytes]:
    """JPEGs of seeded noise at several scales; about 110 kB each at this size, as ImageNet's."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        picture = np.full((height, width, 3), 128, np.float32)
        for cell, strength in ((2, 28), (8, 16), (32, 25), (128, 40)):
            noise = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
            picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        _, data = cv2.imencode(".jpg", picture.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
        found.append(data.tobytes())
    return found


def make_index(root: Path, images: list[bytes], samples: list[int], classes: int) -> Index:
    """Write one shard per entry of `samples`, its number of samples, repeating the images; and their index."""
    root.mkdir(parents=True)
    labels, indexed = np.random.default_rng(1), []
    for shard, count in enumerate(samples):
        path = root / f"{shard:04d}.tar"
        members = (
            (f"n{shard:03d}{n:06d}", "jpg", images[n % len(images)], int(labels.integers(classes)))
            for n in range(count)
        )
        write_shard(path, members)
        indexed.append(index_shard(str(root), path.name))
    write_index(root / "index.json", str(root), [f"n{label:08d}" for label in range(classes)], indexed)
    return Index(root / "index.json")


def imaginary_shards(samples: list[int], classes: int) -> list[ShardIndex]:
    """Rows like ImageNet's for shards that do not exist, where nothing reads an image."""
    rng, shards = np.random.default_rng(0), []
    for number, count in enumerate(samples):
        rows = np.zeros(count, row_type(25))
        rows["key"] = [f"n{number:08d}/n{number:08d}_{position}".encode() for position in range(count)]
        rows["size"] = rng.integers(20_000, 200_000, count)
        rows["offset"] = np.cumsum(rows["size"] + 2048) - rows["size"]
        rows["label"], rows["crc32c"] = rng.integers(0, classes, count), rng.integers(0, 2**32, count)
        end = int(rows["offset"][-1] + rows["size"][-1])
        shards.append(ShardIndex(f"{number:06d}.tar", rows, end, f"{number:064x}", f"{number:032x}"))
    return shards


@dataclass
class Material:
    """The first steps of a plan, rendered, and a store that holds predictions for them."""

    root: Path
    index: Index
    plan: Plan
    steps: list[Batch]
    store: Store


def make_material(
    root: Path, index: Index, recipe: Recipe, groups: int, steps: int, workers: int, pin: bool
) -> Material:
    """`steps` steps of `groups` groups each, from the first `recipe.block` views."""
    plan = Plan(recipe, tuple(index.names), tuple(map(int, index.samples)), recipe.block, groups)
    rendered = list(step_loader(plan, index, range(steps), range(1), 1, workers, pin))
    return Material(root, index, plan, rendered, filled_store(root / "store.zarr", index, recipe, rendered))


def filled_store(path: Path, index: Index, recipe: Recipe, steps: list[Batch]) -> Store:
    """Random predictions for the first block. The checks of rendered groups are theirs; all others are random too.

    The store caches one chunk, so each change of shard reads and compares a chunk again: more often than training does.
    """
    identity = StoreIdentity(index.fingerprint, recipe, {"model": "none"})
    store = StoreWriter.create(str(path), identity, index, recipe.block, "argmax", 1, "float32")
    known = [pair for batch in steps for pair in zip(batch.items, batch.checks, strict=True)]
    rng = np.random.default_rng(2)
    for unit in store.units(recipe.block):
        samples = int(index.samples[unit.shard])
        argmax = rng.integers(0, store.classes, (recipe.block, samples), np.uint16)
        checks = rng.integers(0, 2**63, (recipe.block, group_count(samples, recipe.group_size)), np.uint64)
        for item, check in known:
            if item.shard == unit.shard:
                checks[item.view, item.group] = check
        store.write_unit(unit, {"argmax": argmax}, checks)
    store.cache_size = 1
    return store
