"""Decode and render: image bytes and parameters to a view, a uint8 picture 3 x size x size.

Order and semantics are DeiT's through timm: random resized crop (bicubic, antialiased), flip,
RandAugment, erasing. Only kernels whose bits hold on every machine are used: integer arithmetic of
numpy, OpenCV's integer paths with coordinates of our own, torch's antialiased uint8 resize.
"""

import io
from functools import lru_cache
from statistics import NormalDist

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from pipeline.config import Recipe
from pipeline.recipe import Box, ViewParams, philox

cv2.ipp.setUseIPP(False)  # IPP's results depend on the processor

FIXED = 15  # fractional bits of source coordinates while they are computed
REMAP = 5  # fractional bits that cv2.remap interpolates at


class Undecodable(ValueError):
    """The bytes are no whole image; the message says why."""


def decode(data: bytes) -> np.ndarray:
    """An encoded image as uint8 (height, width, 3) RGB.

    Whatever Pillow's convert("RGB") makes of grey, palette, CMYK and alpha, as torchvision and timm
    do; EXIF orientation is ignored, as they do.

    Raises:
        Undecodable: empty, truncated or no image.
    """
    if not data:
        raise Undecodable("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # what Pillow asks for, else it warns
            return np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise Undecodable(str(error) or type(error).__name__) from error


def render(image: np.ndarray, params: ViewParams, recipe: Recipe) -> np.ndarray:
    """One view of an image.

    Args:
        image: uint8 (height, width, 3).
        params: from `draw_view`, for this image's width and height.
        recipe: gives size, fill colour and noise.

    Returns:
        uint8 (3, size, size), C-contiguous, a function of the arguments alone.
    """
    left, top, width, height = params.crop
    view = resize(image[top : top + height, left : left + width], recipe.size, recipe.size)
    if params.flip:
        view = cv2.flip(view, 1)
    fill = tuple(int(round(255 * value)) for value in recipe.mean)
    for name, argument in params.ops:
        view = apply_op(view, name, argument, fill)
    if params.erase:
        view = _erase(view, params.erase, params.noise_key, recipe)
    return np.ascontiguousarray(view.transpose(2, 0, 1))


def center_view(image: np.ndarray, size: int, crop: float) -> np.ndarray:
    """The evaluation view: the short side to int(size / crop), then the centre.

    torchvision's Resize(int(size / crop), bicubic) and CenterCrop(size), as DeiT evaluates.
    uint8 (height, width, 3) to uint8 (3, size, size).
    """
    height, width = image.shape[:2]
    short = int(size / crop)
    if width <= height:
        new_width, new_height = short, int(short * height / width)
    else:
        new_width, new_height = int(short * width / height), short
    view = resize(image, new_width, new_height)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.ascontiguousarray(view[top : top + size, left : left + size].transpose(2, 0, 1))


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Antialiased bicubic, as Pillow's to within 1 level (mean difference 0.02)."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    pixels = torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1)[None]
    out = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def _erase(view: np.ndarray, box: Box, noise_key: bytes, recipe: Recipe) -> np.ndarray:
    left, top, width, height = box
    words = philox(noise_key).random_raw(-(-3 * width * height // 4))
    index = words.astype("<u8").view("<u2")[: 3 * width * height].reshape(height, width, 3)
    table = _noise_table(recipe.mean, recipe.std)
    view = view.copy()
    for channel in range(3):
        view[top : top + height, left : left + width, channel] = table[channel].take(index[..., channel])
    return view


@lru_cache
def _noise_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """uint8 (3, 65536): 255 * (mean + std * N(0, 1)), clipped, at 65,536 equally likely quantiles."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    values = 255 * (np.array(mean)[:, None] + np.array(std)[:, None] * quantiles)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def apply_op(view: np.ndarray, name: str, argument: float | None, fill: tuple[int, ...]) -> np.ndarray:
    """One RandAugment op, as Pillow's through timm (timm.data.auto_augment.NAME_TO_OP).

    uint8 (size, size, 3) to the same; never in place. `argument` is `op_argument`'s, `fill` the
    colour of what geometry uncovers.
    """
    return OPS[name](view, argument, fill)


def _autocontrast(view, _, __):
    return cv2.LUT(view, _per_channel(view, _autocontrast_table))


def _equalize(view, _, __):
    return cv2.LUT(view, _per_channel(view, _equalize_table))


def _per_channel(view: np.ndarray, table) -> np.ndarray:
    histograms = [cv2.calcHist([view], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(3)]
    return np.stack([table(histogram) for histogram in histograms], axis=-1)[None].astype(np.uint8)


def _autocontrast_table(histogram: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(histogram)
    low, high = int(used[0]), int(used[-1])
    if high <= low:
        return np.arange(256)
    scale = 255.0 / (high - low)
    return np.clip((np.arange(256) * scale + -low * scale).astype(np.int64), 0, 255)


def _equalize_table(histogram: np.ndarray) -> np.ndarray:
    used = histogram[histogram > 0]
    step = int(used.sum() - used[-1]) // 255
    if len(used) <= 1 or step == 0:
        return np.arange(256)
    before = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + before) // step, 255)


def _table(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


LEVELS = np.arange(256)


def _invert(view, _, __):
    return 255 - view


def _posterize(view, bits, _):
    return view & np.uint8(0xFF << (8 - bits) & 0xFF)  # 0 bits: black, as Pillow before 13


def _solarize(view, threshold, _):
    return cv2.LUT(view, _table(np.where(LEVELS < threshold, LEVELS, 255 - LEVELS)))


def _solarize_add(view, addend, _):
    return cv2.LUT(view, _table(np.where(LEVELS < 128, LEVELS + addend, LEVELS)))


def _blend(base, view, factor):
    """base + factor * (view - base) as Pillow's ImageEnhance: truncated and clipped; factor to 2^-20."""
    factor = round(factor * (1 << 20))
    # 128 / 2^20 is as much as the factor's rounding can take from an exact integer
    return _table(((base << 20) + factor * (view.astype(np.int32) - base) + 128) >> 20)


def _grey(view: np.ndarray) -> np.ndarray:
    """int32 (height, width): Pillow's convert("L")."""
    wide = view.astype(np.int32)
    return (wide[..., 0] * 19595 + wide[..., 1] * 38470 + wide[..., 2] * 7471 + 0x8000) >> 16


def _color(view, factor, _):
    return _blend(_grey(view)[..., None], view, factor)


def _contrast(view, factor, _):
    mean = int(_grey(view).mean() + 0.5)
    return cv2.LUT(view, _blend(np.int32(mean), LEVELS, factor))


def _brightness(view, factor, _):
    return cv2.LUT(view, _blend(np.int32(0), LEVELS, factor))


def _sharpness(view, factor, _):
    """Pillow's SMOOTH is (the sum of 3 x 3 + 4 x the centre) / 13; the border stays."""
    total = cv2.boxFilter(view, cv2.CV_16U, (3, 3), normalize=False).astype(np.int32) + view.astype(np.int32) * 4
    smooth = view.astype(np.int32)
    smooth[1:-1, 1:-1] = (2 * total[1:-1, 1:-1] + 13) // 26
    return _blend(smooth, view, factor)


def _rotate(view, degrees, fill):
    angle = -np.radians(degrees)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    centre = view.shape[0] / 2
    return warp(
        view, (cos, sin, centre - (cos + sin) * centre, -sin, cos, centre + (sin - cos) * centre), fill
    )


def _shear_x(view, factor, fill):
    return warp(view, (1, factor, 0, 0, 1, 0), fill)


def _shear_y(view, factor, fill):
    return warp(view, (1, 0, 0, factor, 1, 0), fill)


def _translate_x(view, fraction, fill):
    return warp(view, (1, 0, fraction * view.shape[1], 0, 1, 0), fill)


def _translate_y(view, fraction, fill):
    return warp(view, (1, 0, 0, 0, 1, fraction * view.shape[0]), fill)


def warp(view: np.ndarray, matrix: tuple[float, ...], fill: tuple[int, ...]) -> np.ndarray:
    """Pillow's Image.transform(AFFINE, matrix, BICUBIC): output pixel centres to input, bicubic.

    The coordinates are ours, in integers at 1/32 pixel, and the weights that OpenCV 4's remap has for
    them are an integer table, so the bits hold with and without AVX2; those of its warpAffine, and of
    OpenCV 5's remap, are not.
    """
    height, width = view.shape[:2]
    a, b, c, d, e, f = (round(value * (1 << FIXED)) for value in matrix)
    half = (1 << FIXED) // 2
    # centre to centre: x_in = a (x + 1/2) + b (y + 1/2) + c - 1/2, and a rounding half of 1/32
    rounding = 1 << (FIXED - REMAP - 1)
    columns, rows = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)
    x = (columns * a + ((a + b) // 2 + c - half + rounding))[None] + (rows * b)[:, None]
    y = (columns * d + ((d + e) // 2 + f - half + rounding))[None] + (rows * e)[:, None]
    x >>= FIXED - REMAP
    y >>= FIXED - REMAP
    whole = np.empty((height, width, 2), np.int16)
    whole[..., 0], whole[..., 1] = x >> REMAP, y >> REMAP
    part = ((y & 31) << REMAP | (x & 31)).astype(np.uint16)
    return cv2.remap(view, whole, part, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)


OPS = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": _brightness,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
