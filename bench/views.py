"""Views per second on one core: ours at 1, 3 and 8 views per decode, against timm's, and the limit.

All ways take turns on the same images, a group of 64 at a time, in one process with one thread; their
order changes from group to group and round to round, and ratios are taken within a round.

    python bench/views.py FOLDER_OF_JPEGS [--rounds 7] [--images 250]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts a thread pool

import collections
import io
import time
from collections.abc import Callable
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from experiment import read_jpegs
from machine import conditions
from PIL import Image
from results import head, ratios, rotated, row, spread
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from pipeline.config.schema import Recipe
from pipeline.shards.images import decode_trusted
from pipeline.views.draw import draw_view
from pipeline.views.render import render

RECIPE = Recipe()
Way = Callable[[list[bytes], int], int]
"""Renders a group of JPEGs in a turn; returns how many views that was."""


def timm_way(uint8: bool) -> Way:
    """DeiT's training transform as timm makes it, from JPEG bytes.

    The float form normalizes and erases as DeiT does. The uint8 form is what timm's prefetcher is fed
    with, plus the same erasing (drawn and written by timm's class), so that both apply the entire recipe.
    """
    transform = create_transform(
        RECIPE.size, is_training=True, color_jitter=0.3, auto_augment=RECIPE.auto_augment,
        interpolation="bicubic", re_prob=0 if uint8 else RECIPE.erase_prob, re_mode="pixel", re_count=1,
        use_prefetcher=uint8,
    )  # fmt: skip
    assert isinstance(transform, Compose)
    eraser = RandomErasing(probability=RECIPE.erase_prob, mode="pixel", max_count=1, device="cpu")

    def several(group: list[bytes], turn: int) -> int:
        for data in group:
            picture = transform(Image.open(io.BytesIO(data)).convert("RGB"))
            if uint8:
                picture = torch.as_tensor(picture)
                channels, height, width = picture.shape
                eraser._erase(picture, channels, height, width, torch.float32)
        return len(group)

    return several


def our_way(views: int) -> Way:
    """As pipeline.batches.batch.Renderer does it: a group is decoded, then each of its views drawn and rendered."""
    out = np.empty((64, 3, RECIPE.size, RECIPE.size), np.uint8)

    def several(group: list[bytes], turn: int) -> int:
        images = [decode_trusted(data) for data in group]
        for view in range(turn * views, (turn + 1) * views):
            drawn = [
                draw_view(RECIPE, f"n{number:08d}", view, image.shape[1], image.shape[0])
                for number, image in enumerate(images)
            ]
            for image, params, picture in zip(images, drawn, out, strict=False):
                render(image, params, RECIPE, out=picture)
        return views * len(group)

    return several


def decode_only(group: list[bytes], turn: int) -> int:
    return len([decode_trusted(data) for data in group])


WAYS: dict[str, Way] = {
    "timm, float": timm_way(uint8=False),
    "timm, uint8": timm_way(uint8=True),
    "ours, 1 view per decode": our_way(1),
    "ours, 3 views per decode": our_way(3),
    "ours, 8 views per decode": our_way(8),
    "decoding alone (the limit at 1)": decode_only,
}


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", "count", default=250, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(folder: Path, count: int, rounds: int):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images = read_jpegs(folder, count)
    groups = [images[first : first + 64] for first in range(0, len(images), 64)]
    print(conditions() + "\n")
    rates = collections.defaultdict(list)
    for turn in range(rounds + 1):
        spent, made = collections.defaultdict(float), collections.Counter()
        for number, group in enumerate(groups):
            for name in rotated(list(WAYS), turn + number):
                start = time.perf_counter()
                made[name] += WAYS[name](group, turn)
                spent[name] += time.perf_counter() - start
        if turn:  # the first warms up
            for name in WAYS:
                rates[name].append(made[name] / spent[name])
    head(f"{RECIPE.size} px, {len(images)} images, {rounds} rounds", "views/s", "/ timm, uint8")
    for name in WAYS:
        row(name, spread(rates[name]), spread(ratios(rates[name], rates["timm, uint8"])))


if __name__ == "__main__":
    main()
