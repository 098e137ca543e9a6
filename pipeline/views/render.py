"""Render a view, a uint8 image 3 x size x size, from a decoded image and drawn parameters.

Order and semantics are those of DeiT's timm transforms: random resized crop (bicubic, antialiased), flip, RandAugment
or AutoAugment or colour jitter, erasing. Only kernels that give the same bits on every machine are used: torch's
antialiased uint8 resize, and those of pipeline.views.ops.
"""

from functools import lru_cache
from statistics import NormalDist

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from pipeline.common.streams import noise_words
from pipeline.config.schema import Recipe
from pipeline.views.draw import Box, ViewParams
from pipeline.views.ops import apply_op


def render(image: np.ndarray, params: ViewParams, recipe: Recipe, out: np.ndarray | None = None) -> np.ndarray:
    """Render one view of an image.

    Args:
        image: uint8 (height, width, 3).
        params: from `draw_view`, for this image's width and height.
        recipe: its size, mean (fill colour and noise) and std (noise) are used.
        out: uint8 (3, size, size), C-contiguous, to write to.

    Returns:
        uint8 (3, size, size), C-contiguous: `out` if given; it depends on the other arguments only.
    """
    left, top, width, height = params.crop
    view = _resize(image[top : top + height, left : left + width], recipe.size, recipe.size)
    if out is None:
        out = np.empty_like(view)
    for plane, target in zip(view, out, strict=True):
        target[:] = cv2.flip(plane, 1) if params.flip else plane
    if params.ops:
        fill = fill_colour(recipe.mean)
        view = cv2.merge(list(out))
        for name, argument in params.ops:
            view = apply_op(view, name, argument, fill)
        for target, plane in zip(out, cv2.split(view), strict=True):
            target[:] = plane
    if params.erase:
        _erase(out, params.erase, params.noise_key, recipe)
    return out


@lru_cache
def fill_colour(mean: tuple[float, ...]) -> tuple[int, int, int]:
    """What an op shows where it has moved the picture away, in 0..255: the recipe's mean, as in timm."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def center_view(image: np.ndarray, size: int, crop: float) -> np.ndarray:
    """Render the evaluation view: resize the short side to int(size / crop), then crop the centre.

    torchvision's Resize(int(size / crop), bicubic) and CenterCrop(size), as in DeiT's evaluation.
    uint8 (height, width, 3) to uint8 (3, size, size).
    """
    height, width = image.shape[:2]
    short = int(size / crop)
    if width <= height:
        new_width, new_height = short, int(short * height / width)
    else:
        new_width, new_height = int(short * width / height), short
    view = _resize(image, new_width, new_height)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.ascontiguousarray(view[:, top : top + size, left : left + size])


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize, antialiased bicubic; within 1 level of Pillow's result (mean difference 0.02).

    uint8 (rows, columns, 3) to uint8 (3, height, width), C-contiguous.
    """
    if image.shape[:2] == (height, width):
        return image.transpose(2, 0, 1).copy(order="C")
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    out = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return out[0].contiguous().numpy()


def _erase(view: np.ndarray, box: Box, noise_key: bytes, recipe: Recipe) -> None:
    """Fill a box of a view (3, size, size) with noise, in place."""
    left, top, width, height = box
    index = noise_words(noise_key, 3 * width * height).reshape(3, height, width)
    for plane, table, words in zip(view, _noise_table(recipe.mean, recipe.std), index, strict=True):
        plane[top : top + height, left : left + width] = table[words]


@lru_cache
def _noise_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """uint8 (3, 65536): 255 * (mean + std * N(0, 1)), clipped, at 65,536 equally likely quantiles."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    values = 255 * (np.array(mean)[:, None] + np.array(std)[:, None] * quantiles)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
