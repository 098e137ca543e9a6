"""Decoding and rendering: what is refused, the same bytes everywhere, timm's and torchvision's semantics."""

import hashlib
import io
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Recipe
from pipeline.recipe import INCREASING_OPS, ViewParams, draw_view, op_argument, philox
from pipeline.views import (
    OPS,
    Undecodable,
    apply_op,
    center_view,
    decode,
    render,
    resize,
)

FILL = (124, 116, 104)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
POINTWISE = tuple(name for name in INCREASING_OPS if name not in GEOMETRIC)

property_settings = settings(derandomize=True, deadline=None, max_examples=40)


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
TINY = {name: encode(Image.fromarray(natural(1, 19, 17))) for name, encode in ENCODINGS.items()}

# decode


@pytest.mark.parametrize("size", [(61, 47), (1, 40), (40, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decode_gives_uint8_rgb(encoding, size):
    pixels = decode(ENCODINGS[encoding](Image.fromarray(natural(0, *size))))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (size[1], size[0], 3))


@pytest.mark.parametrize("encoding", ["png", "webp_lossless"])
def test_decode_gives_the_pixels_of_a_lossless_file(encoding):
    image = natural(0, 61, 47)
    assert np.array_equal(decode(ENCODINGS[encoding](Image.fromarray(image))), image)


def test_decode_gives_the_colours_of_a_lossy_file():
    image = natural(0, 61, 47, noise=0)
    for encoding in ("jpeg_444", "jpeg_cmyk", "webp", "png_palette"):
        pixels = decode(ENCODINGS[encoding](Image.fromarray(image)))
        assert np.abs(pixels.astype(int) - image).mean() < 12, encoding


def test_decode_drops_alpha_and_keeps_the_colours_under_it():
    image = natural(0, 61, 47)
    assert np.array_equal(decode(encoded(translucent(Image.fromarray(image)), "PNG")), image)


def test_decode_ignores_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = natural(0, 61, 47)
    assert np.array_equal(decode(encoded(Image.fromarray(image), "PNG", exif=exif)), image)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decode_of_a_file_cut_anywhere_is_refused_or_whole(encoding):
    data = TINY[encoding]
    whole = decode(data)
    for cut in range(len(data)):
        try:
            pixels = decode(data[:cut])
        except Undecodable:
            continue
        assert np.array_equal(pixels, whole), f"cut to {cut} of {len(data)} bytes"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decode_refuses_a_truncated_file_with_a_reason(encoding, share):
    data = ENCODINGS[encoding](Image.fromarray(natural(0, 61, 47)))
    with pytest.raises(Undecodable, match="[a-z]{3}"):
        decode(data[: int(share * len(data))])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"<svg/>",
        b"not a picture" * 99,
        bytes(5000),
        philox(bytes(16)).random_raw(500).tobytes(),
        TINY["png"][:40] + bytes(400),
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 400,
        b"\0" + TINY["jpeg_420"],
    ],
    ids=lambda data: repr(data[:12]),
)
def test_decode_refuses_garbage_with_a_reason(data):
    with pytest.raises(Undecodable, match="[a-z]{3}"):
        decode(data)


# render


def off(size: int) -> Recipe:
    return Recipe(size=size, hflip=0, auto_augment=None, erase_prob=0, scale=(1, 1), ratio=(1, 1))


PLAIN = ViewParams(crop=(0, 0, 48, 48), flip=False, ops=(), erase=None, noise_key=bytes(16))


@property_settings
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([8, 33, 64, 224]), st.integers(0, 999))
def test_render_gives_a_contiguous_uint8_picture(width, height, size, view):
    recipe = Recipe(size=size, auto_augment="rand-m9-mstd0.5-p1-inc1", erase_prob=0.5)
    picture = render(natural(0, width, height), draw_view(recipe, "key", view, width, height), recipe)
    assert (picture.shape, picture.dtype, picture.flags.c_contiguous) == ((3, size, size), np.uint8, True)


@pytest.mark.parametrize("size", [(64, 64), (200, 90)], ids=str)
def test_render_leaves_its_input_alone(size):
    image = natural(0, *size)
    before = image.copy()
    recipe = Recipe(size=64, auto_augment="rand-m9-mstd0.5-p1-inc1", erase_prob=1, scale=(0.5, 1))
    for view in range(60):
        render(image, draw_view(recipe, "key", view, *size), recipe)
    assert np.array_equal(image, before)


def test_erasing_leaves_the_image_alone():
    image = natural(0, 48, 48)
    before = image.copy()
    render(image, ERASED, off(48))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", OPS)
def test_op_leaves_its_input_alone(name):
    image = natural(0, 64, 64)
    before = image.copy()
    apply_op(image, name, op_argument(name, 9, False), FILL)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("size", [64, 200], ids=str)
def test_view_shares_no_memory_with_its_image(size):
    image = natural(0, 64, 64)
    assert not np.shares_memory(render(image, draw_view(off(size), "key", 0, 64, 64), off(size)), image)


def test_render_with_everything_off_of_an_image_of_its_size_is_the_image():
    image = natural(0, 64, 64)
    view = render(image, draw_view(off(64), "key", 3, 64, 64), off(64))
    assert np.array_equal(view, image.transpose(2, 0, 1))


def test_crop_of_the_views_size_is_cut_out_unchanged():
    image = natural(0, 90, 70)
    params = ViewParams(crop=(30, 11, 48, 48), flip=False, ops=(), erase=None, noise_key=bytes(16))
    assert np.array_equal(render(image, params, off(48)), image[11:59, 30:78].transpose(2, 0, 1))


def test_flip_is_the_mirror():
    image = natural(0, 48, 48)
    flipped = ViewParams(crop=PLAIN.crop, flip=True, ops=(), erase=None, noise_key=PLAIN.noise_key)
    assert np.array_equal(render(image, flipped, off(48)), render(image, PLAIN, off(48))[:, :, ::-1])


def test_ops_are_applied_in_their_order():
    image = natural(0, 48, 48)
    ops = (("SolarizeAdd", 100), ("PosterizeIncreasing", 2))
    params = ViewParams(crop=PLAIN.crop, flip=False, ops=ops, erase=None, noise_key=PLAIN.noise_key)
    expected = apply_op(apply_op(image, *ops[0], FILL), *ops[1], FILL).transpose(2, 0, 1)
    assert np.array_equal(render(image, params, off(48)), expected)


def test_geometry_uncovers_the_recipes_mean():
    params = ViewParams(
        crop=PLAIN.crop, flip=False, ops=(("TranslateXRel", 0.45),), erase=None, noise_key=PLAIN.noise_key
    )
    view = render(natural(0, 48, 48), params, Recipe(size=48, mean=(0.1, 0.5, 0.9)))
    assert view[:, :, -15:].reshape(3, -1).T.tolist() == [[26, 128, 230]] * (15 * 48)


ERASED = ViewParams(crop=PLAIN.crop, flip=False, ops=(), erase=(5, 9, 30, 21), noise_key=bytes(range(16)))


def erased_box(params: ViewParams = ERASED, recipe: Recipe = Recipe(size=48)) -> np.ndarray:
    return render(natural(0, 48, 48), params, recipe)[:, 9:30, 5:35]


def test_erasing_changes_only_its_box():
    image = natural(0, 48, 48)
    changed = render(image, ERASED, off(48)) != render(image, PLAIN, off(48))
    changed[:, 9:30, 5:35] = False
    assert not changed.any()


def test_erased_box_does_not_depend_on_the_image():
    other = render(natural(1, 48, 48), ERASED, Recipe(size=48))[:, 9:30, 5:35]
    assert np.array_equal(erased_box(), other)


def test_another_noise_key_erases_with_other_noise():
    other = ViewParams(crop=PLAIN.crop, flip=False, ops=(), erase=ERASED.erase, noise_key=bytes(16))
    assert (erased_box() != erased_box(other)).mean() > 0.9


def test_erasing_noise_is_the_recipes_normal_clipped():
    recipe = Recipe(size=224, mean=(0.2, 0.5, 0.7), std=(0.1, 0.2, 0.3))
    params = ViewParams(
        crop=(0, 0, 224, 224), flip=False, ops=(), erase=(0, 0, 200, 200), noise_key=bytes(range(16))
    )
    noise = render(natural(0, 224, 224), params, recipe)[:, :200, :200].reshape(3, -1)
    normal = np.random.default_rng(0).normal(size=(3, 40000))
    wanted = np.clip(255 * (np.array(recipe.mean)[:, None] + np.array(recipe.std)[:, None] * normal), 0, 255)
    # 40,000 draws: four standard errors of a mean are 1.5, of a standard deviation 1.1
    assert np.abs(noise.mean(1) - wanted.mean(1)).max() < 2 and np.abs(noise.std(1) - wanted.std(1)).max() < 2


def test_erasing_noise_differs_from_pixel_to_pixel_and_channel_to_channel():
    box = erased_box().reshape(3, -1).astype(float)
    neighbours = np.corrcoef(box[:, :-1].ravel(), box[:, 1:].ravel())[0, 1]
    channels = np.corrcoef(box)[np.triu_indices(3, 1)]
    assert max(abs(neighbours), *np.abs(channels)) < 0.2


# the same bytes everywhere


def ragged():
    """Encoded images of every encoding and of ragged sizes: (key, bytes)."""
    rng = np.random.default_rng(0)
    for i, width, height in zip(range(75), *rng.integers(1, 330, (2, 75)).tolist(), strict=True):
        encoding = list(ENCODINGS)[i % len(ENCODINGS)]
        yield f"key{i}", ENCODINGS[encoding](Image.fromarray(natural(i, width, height, noise=15)))


def digest_of_views(threads: int, reverse: bool = False) -> str:
    """BLAKE2b over 75 x 7 views, put in one order whatever the order of rendering."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    images = [(key, decode(data)) for key, data in ragged()]
    work = [(key, image, view) for key, image in images for view in range(7)]
    digests = {}
    for key, image, view in reversed(work) if reverse else work:
        recipe = Recipe(size=65 if view else 224, auto_augment="rand-m9-mstd0.5-p0.8-inc1")
        picture = render(image, draw_view(recipe, key, view, image.shape[1], image.shape[0]), recipe)
        digests[key, view] = hashlib.blake2b(picture).digest()
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])
    return hashlib.blake2b(b"".join(digests[key, view] for key, _, view in work)).hexdigest()


def digest_in_another_process(threads: int, **environment: str) -> str:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    result = subprocess.run(
        [sys.executable, "-c", f"import test_views; print(test_views.digest_of_views({threads}))"],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def digest() -> str:
    return digest_of_views(threads=2)


def test_views_rendered_in_reversed_order_are_the_same_bytes(digest):
    assert digest_of_views(threads=2, reverse=True) == digest


def test_views_rendered_in_another_process_with_another_thread_count_are_the_same_bytes(digest):
    assert digest_in_another_process(threads=1, PYTHONHASHSEED="12345") == digest


def test_views_rendered_with_other_processor_instructions_are_the_same_bytes(digest):
    other = {"OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2", "ATEN_CPU_CAPABILITY": "default"}
    assert digest_in_another_process(threads=1, **other) == digest


# timm's ops


@cache
def pictures(size: int) -> list[np.ndarray]:
    low_contrast = natural(3, size, size) // 3 + 70
    flat = np.full((size, size, 3), (0, 128, 255), np.uint8)
    return [natural(1, size, size), natural(2, size, size, noise=1), low_contrast, flat]


def timm_op(image: np.ndarray, name: str, argument, fill=FILL) -> np.ndarray:
    from timm.data.auto_augment import NAME_TO_OP

    arguments = () if argument is None else (argument,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow's, of posterize to 0 bits
        out = NAME_TO_OP[name](
            Image.fromarray(image), *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC
        )
    return np.asarray(out)


def difference(image: np.ndarray, name: str, argument) -> np.ndarray:
    return np.abs(apply_op(image, name, argument, FILL).astype(int) - timm_op(image, name, argument))


def signed_arguments(name: str, magnitude: float) -> set:
    return {op_argument(name, magnitude, negate) for negate in (False, True)}


MAGNITUDES = (0, 2.5, 5, 9, 10)


def test_there_is_an_op_for_every_name_that_is_drawn():
    assert set(OPS) == set(INCREASING_OPS)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_op_is_timms(name, magnitude):
    for argument in signed_arguments(name, magnitude):
        for size in (9, 40, 224):  # small ones have an Equalize with a step of 0 or 1
            for image in pictures(size):
                off_by = difference(image, name, argument)
                assert off_by.max() <= 1 and (off_by > 0).mean() < 0.02, (argument, size)


def inside(name: str, argument, size: int) -> np.ndarray:
    """bool (size, size): 8 pixels from the border, with a source, it and its 5 x 5 neighbours."""
    white = timm_op(np.full((size, size, 3), 255, np.uint8), name, argument, fill=(0, 0, 0))[..., 0] == 255
    kept = cv2.erode(white.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    border = np.zeros_like(kept)
    border[8:-8, 8:-8] = True
    return kept & border


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_op_is_timms(name, magnitude):
    for argument in signed_arguments(name, magnitude):
        where = inside(name, argument, 224)
        assert where.mean() > 0.3
        for image in pictures(224):
            assert difference(image, name, argument)[where].mean() <= 1, argument


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_op_uncovers_what_timms_uncovers(name):
    white = np.full((224, 224, 3), 255, np.uint8)
    for argument in signed_arguments(name, 9):
        ours = apply_op(white, name, argument, (0, 0, 0))[..., 0] > 127
        theirs = timm_op(white, name, argument, fill=(0, 0, 0))[..., 0] > 127
        assert (ours != theirs).mean() < 0.005  # a line of 224 pixels is 0.0045


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_op_of_nothing_is_the_image(name):
    image = natural(0, 65, 65)
    assert np.array_equal(apply_op(image, name, 0.0, FILL), image)


def test_every_op_keeps_the_shape_of_a_small_odd_view():
    image = natural(0, 9, 9)
    for name in OPS:
        out = apply_op(image, name, op_argument(name, 9, True), FILL)
        assert (out.shape, out.dtype) == (image.shape, image.dtype), name


# resizing


@pytest.mark.parametrize("size", [(300, 200), (480, 640), (50, 60), (1, 30), (30, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("target", [(224, 224), (32, 32), (77, 300)], ids=str)
def test_resize_is_pillows_bicubic(size, target):
    image = natural(3, *size)
    theirs = np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
    off_by = np.abs(resize(image, *target).astype(int) - theirs)
    assert off_by.max() <= 2 and off_by.mean() < 0.05


@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (333, 517), (70, 70), (500, 100), (20, 31)])
@pytest.mark.parametrize("size", [64, 65])
def test_center_view_is_torchvisions(width, height, size, crop):
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image = natural(1, width, height)
    short = Resize(int(size / crop), interpolation=InterpolationMode.BICUBIC, antialias=True)
    theirs = np.asarray(CenterCrop(size)(short(Image.fromarray(image)))).transpose(2, 0, 1)
    view = center_view(image, size, crop)
    assert view.shape == theirs.shape and np.abs(view.astype(int) - theirs).mean() < 0.5


def test_center_view_is_contiguous_and_leaves_its_input_alone():
    image = natural(0, 64, 64)
    before = image.copy()
    assert center_view(image, 64, 1.0).flags.c_contiguous and np.array_equal(image, before)


# golden


def painted(width: int, height: int) -> np.ndarray:
    """A picture of integers only, so that it is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (3 * x + y, (x - 40) ** 2 // 9 + 2 * y, 255 - (x * y) // 64)
    noise = (philox(bytes(16)).random_raw(3 * width * height) >> np.uint64(60)).reshape(height, width, 3)
    return ((np.stack(planes, axis=-1) + noise.astype(np.int64)) % 256).astype(np.uint8)


GOLDEN_RECIPE = Recipe(size=96, auto_augment="rand-m9-mstd0.5-n3-p1-inc1", erase_prob=0.25)
GOLDEN_PARAMS = [draw_view(GOLDEN_RECIPE, "golden", view, 160, 120) for view in range(16)]
GOLDEN = "d35eaf82a3a6e1961c16298cdea1fcde"


def test_golden_views_hold_every_op_a_flip_and_an_erased_box():
    assert {name for params in GOLDEN_PARAMS for name, _ in params.ops} == set(OPS)
    assert {params.flip for params in GOLDEN_PARAMS} == {False, True}
    assert any(params.erase for params in GOLDEN_PARAMS)


def test_views_are_the_recorded_ones():
    digest = hashlib.blake2b(digest_size=16)
    for params in GOLDEN_PARAMS:
        digest.update(render(painted(160, 120), params, GOLDEN_RECIPE))
    assert digest.hexdigest() == GOLDEN, (
        f"rendered bits changed: bump views_version (VIEWS_VERSION in pipeline/recipe.py), "
        f"then record {digest.hexdigest()}"
    )
