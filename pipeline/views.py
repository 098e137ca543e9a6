"""Decode and render: image bytes and parameters to a view, a uint8 picture 3 x size x size.

Order and semantics are DeiT's through timm: random resized crop (bicubic, antialiased), flip,
RandAugment or AutoAugment or colour jitter, erasing. Only kernels whose bits hold on every machine
are used: torch's antialiased uint8 resize, and those of pipeline.ops.
"""

import contextlib
import io
import struct
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from pipeline.config import Recipe
from pipeline.ops import apply_op
from pipeline.recipe import Box, ViewParams, noise_words

FORMATS = ("JPEG", "PNG", "WEBP")  # of images in shards
MAX_PIXELS = 50_000_000  # which take 0.5 to 1.1 GB while they are decoded
Image.MAX_IMAGE_PIXELS = None  # the limit is an argument here, and `opened` keeps it


class Undecodable(ValueError):
    """The bytes are no whole image; the message says why."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """An encoded image as uint8 (height, width, 3) RGB; strict.

    Whatever Pillow's convert("RGB") makes of grey, palette, CMYK and alpha, as torchvision and timm
    do; EXIF orientation is ignored, as they do. More than 8 bits a channel, which that clips, are refused.

    Raises:
        Undecodable: empty, truncated, no image, of another format, or of more than `max_pixels`.
    """
    with opened(data, max_pixels, formats) as image:
        return rgb(image)


@contextlib.contextmanager
def opened(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image of which only the header has been read.

    Raises:
        Undecodable: see `decode`; whatever fails in the block counts as that too.
    """
    if not data:
        raise Undecodable("empty file")
    try:
        # formats: Pillow would start Ghostscript for an EPS, whatever the file is called
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise Undecodable(f"{image.width} x {image.height} pixels: more than {max_pixels:,} (data.max_pixels)")
            if image.mode.startswith(("I", "F")):
                raise Undecodable(f"mode {image.mode}: more than 8 bits a channel")
            yield image
    except (MemoryError, Undecodable):
        raise
    except UnidentifiedImageError:  # which names an address in memory
        raise Undecodable(f"no image of the formats {', '.join(formats)}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise Undecodable(str(error) or type(error).__name__) from error


def rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image, uint8 (height, width, 3)."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # what Pillow asks for, else it warns
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert would copy it all the same


def decode_again(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """What `decode` gives, sooner, for bytes that it has accepted before, as indexing does.

    OpenCV decodes plain JPEGs to the same bits with less copying, but does not refuse damaged ones.
    """
    height, width, components = jpeg_frame(data)
    if components in (1, 3) and 0 < height * width <= max_pixels:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None:
            return image
    return decode(data, max_pixels)


def jpeg_frame(data: bytes) -> tuple[int, int, int]:
    """Height, width and colour components of a baseline or progressive JPEG, zeros for anything else."""
    if data[:2] != b"\xff\xd8":
        return 0, 0, 0
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xC0, 0xC1, 0xC2):
            return struct.unpack_from(">HHB", data, place + 5)
        if marker == 0xFF:  # a filling byte
            place += 1
        elif marker in (0x01, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xDB)):
            return 0, 0, 0
        else:
            place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    return 0, 0, 0


def render(image: np.ndarray, params: ViewParams, recipe: Recipe, out: np.ndarray | None = None) -> np.ndarray:
    """One view of an image.

    Args:
        image: uint8 (height, width, 3).
        params: from `draw_view`, for this image's width and height.
        recipe: gives size, fill colour and noise.
        out: uint8 (3, size, size), C-contiguous, to write to.

    Returns:
        uint8 (3, size, size), C-contiguous: `out` if given; a function of the other arguments alone.
    """
    left, top, width, height = params.crop
    view = _resized(image[top : top + height, left : left + width], recipe.size, recipe.size)
    if out is None:
        out = np.empty_like(view)
    for plane, target in zip(view, out, strict=True):
        target[:] = cv2.flip(plane, 1) if params.flip else plane
    if params.ops:
        fill = _fill(recipe.mean)
        view = cv2.merge(list(out))
        for name, argument in params.ops:
            view = apply_op(view, name, argument, fill)
        for target, plane in zip(out, cv2.split(view), strict=True):
            target[:] = plane
    if params.erase:
        _erase(out, params.erase, params.noise_key, recipe)
    return out


@lru_cache
def _fill(mean: tuple[float, ...]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


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
    view = _resized(image, new_width, new_height)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.ascontiguousarray(view[:, top : top + size, left : left + size])


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Antialiased bicubic, as Pillow's to within 1 level (mean difference 0.02).

    uint8 (rows, columns, 3) to uint8 (3, height, width), C-contiguous.
    """
    if image.shape[:2] == (height, width):
        return image.transpose(2, 0, 1).copy(order="C")
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    out = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return out[0].contiguous().numpy()


def _erase(picture: np.ndarray, box: Box, noise_key: bytes, recipe: Recipe) -> None:
    """Noise into a box of a picture (3, size, size), in place."""
    left, top, width, height = box
    index = noise_words(noise_key, 3 * width * height).reshape(3, height, width)
    for plane, table, places in zip(picture, _noise_table(recipe.mean, recipe.std), index, strict=True):
        plane[top : top + height, left : left + width] = table[places]


@lru_cache
def _noise_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """uint8 (3, 65536): 255 * (mean + std * N(0, 1)), clipped, at 65,536 equally likely quantiles."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    values = 255 * (np.array(mean)[:, None] + np.array(std)[:, None] * quantiles)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
