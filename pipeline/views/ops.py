"""The image operations of RandAugment, AutoAugment and colour jitter, as timm does them with Pillow.

Every result has the same bits on every machine, however a kernel is vectorized: either it is integer arithmetic, or
float arithmetic in which every intermediate is exact (multiples of a power of two within 24 bits), or a rounding whose
ties are out of reach of float error.

All functions take and return uint8 (size, size, 3), never in place.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from pipeline.config.policies import FACTOR

FIXED = 15  # fractional bits of source coordinates during computation
REMAP = 5  # fractional bits of the coordinates of cv2.remap
FLOOR = -0.5 + 0.5 / FACTOR  # added before rounding to nearest, it truncates a multiple of 1 / FACTOR
TAP = 1 << 12  # filter weights are multiples of 1 / TAP
LEVELS = np.arange(256)

Fill = tuple[int, int, int]

# A worker forked from a process whose OpenCV has threads would wait forever for threads that it lacks; a view is too
# small to parallelize anyway, and the loader has processes for that.
cv2.setNumThreads(1)


def apply_op(view: np.ndarray, name: str, argument: float | None, fill: Fill) -> np.ndarray:
    """Apply an op by its name in timm.data.auto_augment.NAME_TO_OP.

    Args:
        argument: from `op_argument`.
        fill: the colour of pixels that geometry uncovers.
    """
    cv2.ipp.setUseIPP(False)  # its results depend on the processor; the switch is per thread
    return OPS[name](view, argument, fill)


# pointwise: lookup tables and thresholds


def _autocontrast(view: np.ndarray, _: object, __: object) -> np.ndarray:
    return cv2.merge([cv2.LUT(plane, _autocontrast_table(plane)) for plane in cv2.split(view)])


def _autocontrast_table(plane: np.ndarray) -> np.ndarray:
    low, high = int(plane.min()), int(plane.max())
    if high <= low:
        return LEVELS.astype(np.uint8)
    scale = 255.0 / (high - low)
    return np.clip((LEVELS * scale + -low * scale).astype(np.int64), 0, 255).astype(np.uint8)


def _equalize(view: np.ndarray, _: object, __: object) -> np.ndarray:
    return cv2.merge([cv2.LUT(plane, _equalize_table(plane)) for plane in cv2.split(view)])


def _equalize_table(plane: np.ndarray) -> np.ndarray:
    histogram = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    used = histogram[histogram > 0]
    step = int(used.sum() - used[-1]) // 255
    if len(used) <= 1 or step == 0:
        return LEVELS.astype(np.uint8)
    before = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + before) // step, 255).astype(np.uint8)


def _invert(view: np.ndarray, _: object, __: object) -> np.ndarray:
    return 255 - view


def _posterize(view: np.ndarray, bits: int, _: object) -> np.ndarray:
    return view & np.uint8(0xFF << (8 - bits) & 0xFF)  # 0 bits: black, as Pillow before 13


def _solarize(view: np.ndarray, threshold: float, _: object) -> np.ndarray:
    mask = (view >= threshold).view(np.uint8)  # 1 becomes 255, which inverts
    return view ^ -mask


def _solarize_add(view: np.ndarray, addend: float, _: object) -> np.ndarray:
    return view + (view < 128).view(np.uint8) * np.uint8(addend)  # at most 127 + 128


# enhancements: base + factor * (view - base), truncated, as Pillow's Image.blend


def _blend(view: np.ndarray, base: np.ndarray | int, factor: float) -> np.ndarray:
    """Exact: for factors below 8, addWeighted's float32 holds view * factor + base * (1 - factor) + FLOOR."""
    factor = round(factor * FACTOR) / FACTOR
    if isinstance(base, int):
        return cv2.addWeighted(view, factor, view, 0, base * (1 - factor) + FLOOR)
    return cv2.addWeighted(view, factor, base, 1 - factor, FLOOR)


def _color(view: np.ndarray, factor: float, _: object) -> np.ndarray:
    grey = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
    return _blend(view, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), factor)


def _contrast(view: np.ndarray, factor: float, _: object) -> np.ndarray:
    grey = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
    return _blend(view, int(cv2.sumElems(grey)[0] / grey.size + 0.5), factor)


def _brightness(view: np.ndarray, factor: float, _: object) -> np.ndarray:
    return _blend(view, 0, factor)


SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def _sharpness(view: np.ndarray, factor: float, _: object) -> np.ndarray:
    smooth = cv2.filter2D(view, -1, SMOOTH)  # a 13th is never within 1/26 of a tie
    smooth[0], smooth[-1], smooth[:, 0], smooth[:, -1] = view[0], view[-1], view[:, 0], view[:, -1]
    return _blend(view, smooth, factor)


# geometry: Image.transform(AFFINE, BICUBIC) reads at output pixel centres, with Keys' kernel at a = -1


def keys_taps(rest: float) -> np.ndarray:
    """float32 (4,): weights of the pixels at -1, 0, 1, 2 for a position `rest` in 0..1 beyond pixel 0.

    Multiples of 1 / TAP with sum 1, so that a filter's sums over 8-bit pixels are exact in any order.
    """
    d = rest
    taps = [-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2]
    taps = [round(tap * TAP) for tap in taps]
    taps[1] += TAP - sum(taps)
    return np.array(taps, np.float32) / TAP


PHASES = 1 << REMAP
PHASE_TAPS = [keys_taps(phase / PHASES)[None] for phase in range(PHASES)]


def _filter(view: np.ndarray, kernel: np.ndarray, anchor: tuple[int, int]) -> np.ndarray:
    """Filter with exact weights and truncate; the border is replicated."""
    return cv2.filter2D(
        view, -1, kernel, anchor=anchor, delta=-0.5 + 0.5 / TAP, borderType=cv2.BORDER_REPLICATE
    )


def _translate_x(view: np.ndarray, fraction: float, fill: Fill) -> np.ndarray:
    distance = fraction * view.shape[1]
    whole = round(distance)  # uncovers the same pixels as Pillow
    before = distance < whole
    moved = _filter(view, keys_taps(distance - whole + before)[None], (1 + before, 0))
    width = max(0, view.shape[1] - abs(whole))
    left, right = max(0, -whole), max(0, whole)
    return cv2.copyMakeBorder(
        moved[:, right : right + width], 0, 0, left, right, cv2.BORDER_CONSTANT, value=fill
    )


def _translate_y(view: np.ndarray, fraction: float, fill: Fill) -> np.ndarray:
    return cv2.transpose(_translate_x(cv2.transpose(view), fraction, fill))


def _shear_x(view: np.ndarray, factor: float, fill: Fill) -> np.ndarray:
    """Shift each row by its own distance; rows of the same phase (1/32 pixel) are filtered together."""
    height, width = view.shape[:2]
    step = round(factor * (1 << FIXED))
    # output (x, y) is input (x + factor (y + 1/2), y), to the nearest phase
    rounding = 1 << (FIXED - REMAP - 1)
    distance = ((2 * np.arange(height) + 1) * step // 2 + rounding) >> (FIXED - REMAP)
    whole, phase = distance >> REMAP, distance & (PHASES - 1)
    order = np.argsort(phase, kind="stable")
    pad = int(np.abs(whole).max()) + 2
    padded = cv2.copyMakeBorder(view, 0, 0, pad, pad, cv2.BORDER_CONSTANT, value=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded.reshape(height, -1), 3 * (width + 3), axis=1)
    rows = windows[order, 3 * (whole[order] + pad - 1)].reshape(height, width + 3, 3)
    ends = np.searchsorted(phase[order], np.arange(PHASES + 1)).tolist()
    for taps, first, last in zip(PHASE_TAPS, ends, ends[1:], strict=False):
        if first < last:
            rows[first:last] = _filter(rows[first:last], taps, (1, 0))
    out = np.empty_like(view)
    out[order] = rows[:, 1 : width + 1]
    return out


def _shear_y(view: np.ndarray, factor: float, fill: Fill) -> np.ndarray:
    return cv2.transpose(_shear_x(cv2.transpose(view), factor, fill))


def _rotate(view: np.ndarray, degrees: float, fill: Fill) -> np.ndarray:
    angle = -np.radians(degrees)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    centre = view.shape[0] / 2
    return warp(
        view, (cos, sin, centre - (cos + sin) * centre, -sin, cos, centre + (sin - cos) * centre), fill
    )


def warp(view: np.ndarray, matrix: tuple[float, ...], fill: Fill) -> np.ndarray:
    """Image.transform(AFFINE, matrix, BICUBIC), to about 0.6 levels.

    Coordinates are computed here, in integers of 1/32 pixel, and OpenCV 4's remap weighs pixels by an integer table, so
    the bits are the same with and without AVX2; those of its warpAffine, and of OpenCV 5's remap, are not. Its kernel
    has a = -0.75: adding 5/16 of the difference from a linear sample gives about a = -1, and subtracting 3/8 about
    Pillow's truncation (both fitted to photographs).
    """
    height, width = view.shape[:2]
    a, b, c, d, e, f = (round(value * (1 << FIXED)) for value in matrix)
    half = (1 << FIXED) // 2
    # pixel centres: x_in = a (x + 1/2) + b (y + 1/2) + c - 1/2, plus half of 1/32 for rounding
    rounding = 1 << (FIXED - REMAP - 1)
    columns, rows = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)
    x = (columns * a + ((a + b) // 2 + c - half + rounding))[None] + (rows * b)[:, None]
    y = (columns * d + ((d + e) // 2 + f - half + rounding))[None] + (rows * e)[:, None]
    x >>= FIXED - REMAP
    y >>= FIXED - REMAP
    whole = np.empty((height, width, 2), np.int16)
    whole[..., 0], whole[..., 1] = x >> REMAP, y >> REMAP
    fraction = ((y & 31) << REMAP | (x & 31)).astype(np.uint16)
    cubic, linear = (
        cv2.remap(view, whole, fraction, interpolation, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)
        for interpolation in (cv2.INTER_CUBIC, cv2.INTER_LINEAR)
    )
    return cv2.addWeighted(cubic, 1 + 5 / 16, linear, -5 / 16, -3 / 8)


OPS: dict[str, Callable[[np.ndarray, Any, Fill], np.ndarray]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "PosterizeOriginal": _posterize,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "ColorIncreasing": _color,
    "Contrast": _contrast,
    "ContrastIncreasing": _contrast,
    "Brightness": _brightness,
    "BrightnessIncreasing": _brightness,
    "Sharpness": _sharpness,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
