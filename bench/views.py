"""Views a second on one core: ours at 1, 3 and 8 views a decoding, against timm's, and the limit.

All ways take turns on the same images, a group of 64 at a time, in one process with one thread; the
order of the ways changes from group to group and round to round, and ratios are taken within a round.
Then the cost of every part of a view.

    python bench/views.py FOLDER_OF_JPEGS [--rounds 7] [--images 250]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts a thread pool

import collections
import statistics
import time
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from machine import conditions, spread
from PIL import Image

from pipeline.batches.batch import group_check
from pipeline.config.policies import INCREASING_OPS, op_argument
from pipeline.config.schema import Recipe
from pipeline.shards.images import decode, decode_trusted
from pipeline.views.draw import draw_mix, draw_view
from pipeline.views.ops import apply_op
from pipeline.views.render import _erase, _resize, render

RECIPE = Recipe()
FILL = (124, 116, 104)


def timm_way(uint8: bool):
    """DeiT's training transform as timm makes it, from JPEG bytes.

    The float form normalises and erases as DeiT does. The uint8 form is what timm's prefetcher is fed
    with, plus the same erasing (drawn and written by timm's class), so that both do the whole recipe.
    """
    import io

    from timm.data import create_transform
    from timm.data.random_erasing import RandomErasing

    transform = create_transform(
        RECIPE.size, is_training=True, color_jitter=0.3, auto_augment=RECIPE.auto_augment,
        interpolation="bicubic", re_prob=0 if uint8 else RECIPE.erase_prob, re_mode="pixel", re_count=1,
        use_prefetcher=uint8,
    )  # fmt: skip
    eraser = RandomErasing(probability=RECIPE.erase_prob, mode="pixel", max_count=1, device="cpu")

    def one(data: bytes):
        picture = transform(Image.open(io.BytesIO(data)).convert("RGB"))
        if uint8:
            picture = torch.as_tensor(picture)
            eraser._erase(picture, *picture.shape, torch.float32)
        return picture

    return lambda group, turn: len([one(data) for data in group])


def our_way(views: int):
    """As pipeline.batches.batch.Renderer does it: a group is decoded, then each view of it drawn and rendered."""
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


WAYS = {
    "timm, float": timm_way(uint8=False),
    "timm, uint8": timm_way(uint8=True),
    "ours, 1 view a decoding": our_way(1),
    "ours, 3 views a decoding": our_way(3),
    "ours, 8 views a decoding": our_way(8),
    "decoding alone (the limit at 1)": decode_only,
}


def compare(images: list[bytes], rounds: int) -> None:
    """Views a second of each way, and how many times timm's uint8 form, by rounds."""
    rates = collections.defaultdict(list)
    names = list(WAYS)
    groups = [images[first : first + 64] for first in range(0, len(images), 64)]
    for turn in range(rounds + 1):
        spent, made = collections.Counter(), collections.Counter()
        for number, group in enumerate(groups):
            first = (turn + number) % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                made[name] += WAYS[name](group, turn)
                spent[name] += time.perf_counter() - start
        if turn:  # the first warms up
            for name in names:
                rates[name].append(made[name] / spent[name])
    print(f"\n| {RECIPE.size} px, {len(images)} images, {rounds} rounds | views/s | x timm uint8 |")
    print("| --- | ---: | ---: |")
    for name in names:
        ratios = [ours / timm for ours, timm in zip(rates[name], rates["timm, uint8"], strict=True)]
        print(f"| {name} | {spread(rates[name])} | {spread(ratios)} |")


def parts(images: list[bytes]) -> None:
    """Microseconds of each part of a view, measured in place: between other work, not in a hot loop."""
    cost = collections.defaultdict(list)

    def timed(name, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        cost[name].append(1e6 * (time.perf_counter() - start))
        return result

    out = np.empty((3, RECIPE.size, RECIPE.size), np.uint8)
    for number, data in enumerate(images):
        timed("decode, Pillow", decode, data)
        image = timed("decode, OpenCV (used)", decode_trusted, data)
        drawn = [
            timed("draw a view, among those of its group", draw_view, RECIPE, f"n{number}", view, *image.shape[1::-1])
            for view in range(8)
        ]
        for params in drawn[:3]:
            left, top, width, height = params.crop
            timed("render, all of it", render, image, params, RECIPE, out)
            crop = image[top : top + height, left : left + width]
            planes = timed("  resize, antialiased bicubic", _resize, crop, RECIPE.size, RECIPE.size)
            timed("  flip (half of the views)", lambda planes: [cv2.flip(plane, 1) for plane in planes], planes)
            view = timed("  from planes to pixels", cv2.merge, list(planes))
            timed("  back to planes", cv2.split, view)
            if params.erase:
                timed("  erase (a quarter of the views)", _erase, out, params.erase, params.noise_key, RECIPE)
        for name in INCREASING_OPS:
            timed(f"  op {name}", apply_op, view, name, op_argument(name, 9, number % 2 == 0), FILL)
        mix = timed("draw the mixing of a group", draw_mix, RECIPE, "shard", number, 0, 64)
        timed("check of a group, one picture of 64", group_check, b"key\n" * 64, mix, out)
    print("\n| part | us, median | mean |\n| --- | ---: | ---: |")
    for name in sorted(cost, key=lambda name: (name.startswith("  op"), name.startswith("  "), name)):
        print(f"| {name.strip()} | {statistics.median(cost[name]):.0f} | {statistics.mean(cost[name]):.0f} |")
    ops = statistics.mean(statistics.mean(cost[f"  op {name}"]) for name in INCREASING_OPS)
    print(f"| op, mean of the {len(INCREASING_OPS)}; one a view is expected | | {ops:.0f} |")


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", "count", default=250, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(folder: Path, count: int, rounds: int):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise click.UsageError(f"{folder}: no .jpg or .jpeg below it")
    images = [path.read_bytes() for path in files[:: max(1, len(files) // count)][:count]]
    print(conditions())
    compare(images, rounds)
    parts(images)


if __name__ == "__main__":
    main()
