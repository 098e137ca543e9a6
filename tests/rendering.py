"""Pictures, encoded in every way, and a digest of views rendered of them: a child that computes it needs no more."""

import hashlib
import io

import cv2
import numpy as np
import torch
from PIL import Image

from pipeline.config.schema import Recipe
from pipeline.shards.images import decode_trusted
from pipeline.views.draw import draw_view
from pipeline.views.render import render


def natural(seed: int, width: int, height: int, noise: float = 4) -> np.ndarray:
    """uint8 (height, width, 3): gradients, blobs and light noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    slopes, level = rng.uniform(-90, 90, (2, 3)), rng.uniform(60, 190, 3)
    picture = level + slopes[0] * x[..., None] + slopes[1] * y[..., None]
    for _ in range(12):
        centre_x, centre_y, spread = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.03, 0.2)
        blob = np.exp(-((x - centre_x) ** 2 + (y - centre_y) ** 2) / (2 * spread**2))
        picture += blob[..., None] * rng.uniform(-120, 120, 3)
    picture += rng.normal(0, noise, picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def translucent(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


ENCODINGS = {
    "jpeg_420": lambda image: encoded(image, "JPEG", subsampling=2),
    "jpeg_444": lambda image: encoded(image, "JPEG", subsampling=0),
    "jpeg_progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "jpeg_grey": lambda image: encoded(image.convert("L"), "JPEG"),
    "jpeg_cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "png": lambda image: encoded(image, "PNG"),
    "png_grey": lambda image: encoded(image.convert("L"), "PNG"),
    "png_bits": lambda image: encoded(image.convert("1"), "PNG"),
    "png_palette": lambda image: encoded(image.quantize(32), "PNG"),
    "png_palette_alpha": lambda image: encoded(image.quantize(32), "PNG", transparency=bytes(range(32))),
    "png_alpha": lambda image: encoded(translucent(image), "PNG"),
    "png_grey_alpha": lambda image: encoded(translucent(image).convert("LA"), "PNG"),
    "webp": lambda image: encoded(image, "WEBP"),
    "webp_lossless": lambda image: encoded(image, "WEBP", lossless=True),
    "webp_alpha": lambda image: encoded(translucent(image), "WEBP"),
}
RECIPES = (
    Recipe(size=224, auto_augment="rand-m9-mstd0.5-p0.8-inc1"),
    Recipe(size=65, auto_augment="rand-m9-mstd0.5-n4-p0.8-inc1"),
    Recipe(size=65, auto_augment="original-mstd0.5"),
    Recipe(size=64, auto_augment=None),
)


def ragged():
    """Encoded images of every encoding and of ragged sizes: (key, bytes)."""
    rng = np.random.default_rng(0)
    for i, width, height in zip(range(30), *rng.integers(1, 330, (2, 30)).tolist(), strict=True):
        encoding = list(ENCODINGS)[i % len(ENCODINGS)]
        yield f"key{i}", ENCODINGS[encoding](Image.fromarray(natural(i, width, height, noise=15)))


def digest_of_views(threads: int, reverse: bool = False) -> str:
    """BLAKE2b over 30 x 8 views, put in one order whatever the order of rendering."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    images = [(key, decode_trusted(data)) for key, data in ragged()]
    work = [(key, image, view) for key, image in images for view in range(8)]
    digests = {}
    for key, image, view in reversed(work) if reverse else work:
        recipe = RECIPES[min(view, 7 - view)]
        picture = render(image, draw_view(recipe, key, view, image.shape[1], image.shape[0]), recipe)
        digests[key, view] = hashlib.blake2b(picture).digest()
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])
    return hashlib.blake2b(b"".join(digests[key, view] for key, _, view in work)).hexdigest()
