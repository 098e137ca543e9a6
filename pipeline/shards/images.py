"""Decode images: encoded bytes to RGB pixels, strictly."""

import contextlib
import io
import struct
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")  # of images in shards
MAX_PIXELS = 50_000_000  # decoding that many takes 0.5 to 1.1 GB

Image.MAX_IMAGE_PIXELS = None  # the limit is an argument here; `open_image` enforces it


class Undecodable(ValueError):
    """The bytes are not a complete image; the message says why."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """Decode an image strictly, to uint8 (height, width, 3) RGB.

    Grey, palette, CMYK and alpha become what Pillow's convert("RGB") makes of them, as in torchvision and timm; EXIF
    orientation is ignored, as there. More than 8 bits per channel, which that would clip, are refused.

    Raises:
        Undecodable: empty, truncated, not an image, of another format, or of more than `max_pixels`.
    """
    with open_image(data, max_pixels, formats) as image:
        return to_rgb(image)


@contextlib.contextmanager
def open_image(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Yield an image of which only the header has been read.

    Raises:
        Undecodable: see `decode`; any error in the block counts as that too.
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
    except UnidentifiedImageError:  # its message contains a memory address
        raise Undecodable(f"no image of the formats {', '.join(formats)}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise Undecodable(str(error) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image, uint8 (height, width, 3)."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns otherwise
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert would copy even RGB


def decode_trusted(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode, faster but to the same bits, an image that `decode` has accepted before (indexing does that).

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
    """Height, width and colour components of a baseline or progressive JPEG; zeros for anything else."""
    if data[:2] != b"\xff\xd8":
        return 0, 0, 0
    offset = 2
    while offset + 10 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker in (0xC0, 0xC1, 0xC2):
            return struct.unpack_from(">HHB", data, offset + 5)
        if marker == 0xFF:  # a fill byte
            offset += 1
        elif marker in (0x01, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xDB)):
            return 0, 0, 0
        else:
            offset += 2 + struct.unpack_from(">H", data, offset + 2)[0]
    return 0, 0, 0
