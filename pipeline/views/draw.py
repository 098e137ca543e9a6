"""Draw the parameters of views, groups and mixing, as pure functions of (recipe, identity).

Raw words come from Philox4x64-10, keyed by BLAKE2b of (recipe seed, stream, identity), so nothing depends on a position
in a list, a worker, or the state of a global generator. Every quantity is computed from those words by our own formula
and rounded to the precision in use (whole pixels, 1/65536), because numpy's distributions and the last bit of libm may
change.

The semantics are timm's (RandomResizedCropAndInterpolation, RandAugment, RandomErasing, Mixup) as DeiT uses them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from pipeline.common.streams import permutation, philox, raw_words, stream_key, uniforms
from pipeline.config.policies import FACTOR, INCREASING_OPS, AutoAugment, RandAugment, op_argument, parse_policy
from pipeline.config.schema import Recipe
from pipeline.config.validation import fingerprint

VIEWS_VERSION = 2  # bump on any change of a drawn number or a rendered bit

RESOLUTION = 65536  # magnitudes and lambdas are multiples of 1 / RESOLUTION
ATTEMPTS = 10  # of crop and erasing, as in timm
NORMAL = NormalDist()

# which of a view's uniform numbers draw what
CROP, FLIP, ERASE = slice(0, 22), 22, slice(23, 46)
OPS = 46  # and all after it

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels
Ops = tuple[tuple[str, float | None], ...]


class ViewParams(NamedTuple):
    """The parameters of one view of one image."""

    crop: Box
    """The crop in the image, which is then resized to size x size."""
    flip: bool
    ops: Ops
    """The ops to apply, in order, each with its argument (degrees, bits, factor, ...)."""
    erase: Box | None
    """The erased box in the view; None: nothing is erased."""
    noise_key: bytes
    """The view's key, 16 bytes, from which `noise_words` draws the pixels of the erased box."""


@dataclass(frozen=True)
class Mix:
    """How one group is mixed in one view: x * lam + x[partner] * (1 - lam), or a box of x[partner]."""

    method: str
    """none, mixup or cutmix"""
    lam: float
    """Weight of a sample's own image and label, in [0, 1]; for cutmix the area outside the clipped box."""
    box: Box
    """Where cutmix shows the partner; empty otherwise."""
    partner: np.ndarray
    """int64 (group_size,): an involution; slots without a partner, and unused ones, map to themselves."""


def recipe_fingerprint(recipe: Recipe) -> str:
    """The fingerprint of the views: every field of the recipe, and the version of drawing and rendering."""
    return fingerprint({"recipe": recipe.model_dump(mode="json"), "views_version": VIEWS_VERSION})


def draw_view(recipe: Recipe, sample_key: str, view: int, width: int, height: int) -> ViewParams:
    """Draw the parameters of view number `view` of a sample whose image is width x height pixels."""
    key = stream_key(recipe.seed, "view", f"{sample_key}\x1f{view}")
    draw_ops, words = _augmentation(recipe.auto_augment, recipe.color_jitter)
    numbers = uniforms(raw_words(key, OPS + words))
    return ViewParams(
        crop=_draw_crop(recipe, width, height, numbers[CROP]),
        flip=numbers[FLIP] < recipe.hflip,
        ops=draw_ops(numbers[OPS:]),
        erase=_draw_erase(recipe, numbers[ERASE]),
        noise_key=key,
    )


@lru_cache
def _augmentation(text: str | None, jitter: float) -> tuple[Callable[[list[float]], Any], int]:
    """A function that draws the ops of a view from uniform numbers, and how many numbers it needs."""
    policy = parse_policy(text) if text else None
    if isinstance(policy, RandAugment):
        return lambda u: _draw_rand_augment(policy, u), 4 * policy.layers
    if isinstance(policy, AutoAugment):
        return lambda u: _draw_auto_augment(policy, u), 7
    return lambda u: _draw_jitter(jitter, u), 4


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _draw_crop(recipe: Recipe, width: int, height: int, u: list[float]) -> Box:
    """timm.data.transforms.RandomResizedCropAndInterpolation.get_params."""
    low, high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    for attempt in range(ATTEMPTS):
        area = _between(*recipe.scale, u[2 * attempt]) * width * height
        aspect = math.exp(_between(low, high, u[2 * attempt + 1]))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        # timm accepts w = 0 too, and fails on it; a crop has at least a pixel
        if 1 <= w <= width and 1 <= h <= height:
            return int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h
    in_ratio = width / height
    if in_ratio < recipe.ratio[0]:
        w, h = width, max(1, min(height, round(width / recipe.ratio[0])))
    elif in_ratio > recipe.ratio[1]:
        w, h = max(1, min(width, round(height * recipe.ratio[1]))), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def _draw_rand_augment(augment: RandAugment, u: list[float]) -> Ops:
    """timm.data.auto_augment.RandAugment: ops with replacement, each applied with probability p."""
    ops = []
    for layer in range(0, 4 * augment.layers, 4):
        choice, apply, magnitude, sign = u[layer : layer + 4]
        if apply < augment.prob:
            name = INCREASING_OPS[int(choice * len(INCREASING_OPS))]
            drawn = _draw_magnitude(augment.magnitude, augment.std, augment.magnitude_max, magnitude)
            ops.append((name, op_argument(name, drawn, sign < 0.5)))
    return tuple(ops)


def _draw_auto_augment(augment: AutoAugment, u: list[float]) -> Ops:
    """timm.data.auto_augment.AutoAugment: one sub-policy, each of its ops with its own probability."""
    ops = []
    chosen = augment.policy[int(u[6] * len(augment.policy))]
    for (name, prob, magnitude), apply, spread, sign in zip(chosen, u[0:2], u[2:4], u[4:6], strict=True):
        if apply < prob:
            drawn = _draw_magnitude(magnitude, augment.std, 10, spread)
            ops.append((name, op_argument(name, drawn, sign < 0.5)))
    return tuple(ops)


JITTER_ORDERS = tuple(permutations(("Brightness", "Contrast", "Color")))


def _draw_jitter(strength: float, u: list[float]) -> Ops:
    """torchvision's ColorJitter(strength, strength, strength): three factors, in any order."""
    if not strength:
        return ()
    factors = [round(_between(1 - strength, 1 + strength, number) * FACTOR) / FACTOR for number in u[:3]]
    return tuple(zip(JITTER_ORDERS[int(u[3] * len(JITTER_ORDERS))], factors, strict=True))


def _draw_magnitude(magnitude: float, std: float, highest: float, u: float) -> float:
    """Normal around the magnitude (uniform up to it if std is infinite), clipped, rounded to 1/65536."""
    if std == math.inf:
        magnitude = u * magnitude
    elif std:
        magnitude += std * NORMAL.inv_cdf(u)
    return round(max(0.0, min(magnitude, highest)) * RESOLUTION) / RESOLUTION


def _draw_erase(recipe: Recipe, u: list[float]) -> Box | None:
    """timm.data.random_erasing.RandomErasing._erase with one box."""
    if not u[0] < recipe.erase_prob:
        return None
    size = recipe.size
    for attempt in range(ATTEMPTS):
        area = _between(0.02, 1 / 3, u[1 + 2 * attempt]) * size * size
        aspect = math.exp(_between(math.log(0.3), math.log(1 / 0.3), u[2 + 2 * attempt]))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w < size and 1 <= h < size:
            return int(u[22] * (size - w + 1)), int(u[21] * (size - h + 1)), w, h
    return None


def group_count(samples: int, group_size: int) -> int:
    """Number of groups of a shard: the fewest that hold its samples."""
    return -(-samples // group_size)


def draw_groups(recipe: Recipe, shard: str, block: int, samples: int) -> list[np.ndarray]:
    """Permute the rows of a shard and cut them into groups of nearly equal size.

    Returns `group_count` int64 arrays of positions in the shard, which contain each position once.
    """
    order = permutation(stream_key(recipe.seed, "groups", f"{shard}\x1f{block}"), samples)
    return np.array_split(order, group_count(samples, recipe.group_size)) if samples else []


def draw_mix(recipe: Recipe, shard: str, group: int, view: int, members: int) -> Mix:
    """Draw how group number `group` of a shard, with `members` used slots, is mixed in `view`.

    timm.data.mixup.Mixup in batch mode: one lambda and one method per group. timm pairs slot i with n-1-i; here the
    pairs are drawn for each view, because members keep their slots for a block.
    """
    bits = philox(stream_key(recipe.seed, "mix", f"{shard}\x1f{group}\x1f{view}"))
    mixed, switch, centre_x, centre_y = uniforms(bits.random_raw(4))
    slots = np.arange(recipe.group_size)
    alone = Mix("none", 1.0, (0, 0, 0, 0), slots)
    both = recipe.mixup_alpha > 0 and recipe.cutmix_alpha > 0
    cutmix = switch < recipe.switch_prob if both else recipe.cutmix_alpha > 0
    alpha = recipe.cutmix_alpha if cutmix else recipe.mixup_alpha
    if not mixed < recipe.mix_prob or alpha == 0:
        return alone
    order = np.argsort(bits.random_raw(members), kind="stable")
    partner = slots.copy()
    partner[order] = order[::-1]
    lam = _draw_beta(alpha, bits)
    if not cutmix:
        return Mix("mixup", lam, (0, 0, 0, 0), partner)
    size = recipe.size
    half = int(size * math.sqrt(1 - lam)) // 2
    x, y = int(centre_x * size), int(centre_y * size)
    left, right = max(x - half, 0), min(x + half, size)
    top, bottom = max(y - half, 0), min(y + half, size)
    box = (left, top, right - left, bottom - top)
    return Mix("cutmix", 1 - box[2] * box[3] / (size * size), box, partner)


def draw_offset(recipe: Recipe, sample_key: str, view: int) -> float:
    """Draw the number in (0, 1) from which the classes that kind sampled stores for a view follow."""
    return uniforms(raw_words(stream_key(recipe.seed, "sample", f"{sample_key}\x1f{view}"), 1))[0]


def _draw_beta(alpha: float, bits: np.random.Philox) -> float:
    """Beta(alpha, alpha) rounded to 1/65536, by Johnk's rejection (accepts 61 % at 0.8, 50 % at 1)."""
    while True:
        u = uniforms(bits.random_raw(32))
        for a, b in zip(u[::2], u[1::2], strict=True):
            x, y = a ** (1 / alpha), b ** (1 / alpha)
            if 0 < x + y <= 1:
                return round(x / (x + y) * RESOLUTION) / RESOLUTION
