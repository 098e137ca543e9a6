"""Decoding and rendering: what is refused, the same bytes everywhere, torchvision's and Pillow's meaning."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rendering import ENCODINGS, digest_of_views, encoded, natural, translucent
from test_ops import FILL, IMAGENET, files, needs

import pipeline.shards.images
from pipeline.common.streams import philox
from pipeline.config.policies import INCREASING_OPS
from pipeline.config.schema import Recipe
from pipeline.shards.images import Undecodable, decode, decode_trusted, jpeg_frame
from pipeline.views.draw import ViewParams, draw_view
from pipeline.views.ops import OPS, apply_op
from pipeline.views.render import _resize, center_view, render

property_settings = settings(derandomize=True, deadline=None, max_examples=40)


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


# decode again


JPEGS = [name for name in ENCODINGS if name.startswith("jpeg")]


@property_settings
@given(st.sampled_from(sorted(ENCODINGS)), st.integers(1, 90), st.integers(1, 90), st.integers(0, 20))
def test_decoding_again_gives_the_same_pixels(encoding, width, height, noise):
    data = ENCODINGS[encoding](Image.fromarray(natural(0, width, height, noise)))
    assert np.array_equal(decode_trusted(data), decode(data))


def with_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return encoded(image, "JPEG", exif=exif)


def after_its_start(*inserted: bytes):
    """Encodes a JPEG with something before its first marker."""

    def encode(image: Image.Image) -> bytes:
        data = encoded(image, "JPEG")
        return data[:2] + b"".join(inserted) + data[2:]

    return encode


def segment(marker: int, length: int) -> bytes:
    return bytes([0xFF, marker]) + (length + 2).to_bytes(2) + b"\xff\xc0" * (length // 2) + bytes(length % 2)


UNUSUAL = {
    "exif_turned": with_exif,
    "icc_profile": lambda image: encoded(image, "JPEG", icc_profile=bytes(200_000)),
    "long_app_segments": after_its_start(segment(0xE1, 65533), segment(0xED, 65532), segment(0xEF, 0)),
    "comment": after_its_start(segment(0xFE, 301)),
    "filling_bytes": after_its_start(b"\xff" * 9, segment(0xE1, 20), b"\xff" * 3),
    "restart_markers": lambda image: encoded(image, "JPEG", restart_marker_blocks=2),
    "rgb_components": lambda image: encoded(image, "JPEG", keep_rgb=True),
    "subsampled_422": lambda image: encoded(image, "JPEG", subsampling=1),
    "progressive_grey": lambda image: encoded(image.convert("L"), "JPEG", progressive=True),
    "worst_quality": lambda image: encoded(image, "JPEG", quality=1),
    "bytes_after_the_end": lambda image: encoded(image, "JPEG") + bytes(range(256)),
}


@pytest.mark.parametrize("size", [(61, 47), (16, 16), (1, 33)], ids=str)
@pytest.mark.parametrize("kind", UNUSUAL)
def test_decoding_an_unusual_jpeg_again_gives_the_same_pixels(kind, size):
    data = UNUSUAL[kind](Image.fromarray(natural(0, *size)))
    assert np.array_equal(decode_trusted(data), decode(data))


@settings(property_settings, max_examples=300)
@given(st.sampled_from(JPEGS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=3))
def test_decoding_damage_again_that_pillow_accepts_gives_the_same_pixels(encoding, changes):
    data = bytearray(TINY[encoding])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        pixels = decode(bytes(data))
    except Undecodable:
        return
    assert np.array_equal(decode_trusted(bytes(data)), pixels)


@pytest.mark.parametrize("encoding", ["jpeg_420", "jpeg_444", "jpeg_progressive", "jpeg_grey"])
def test_plain_jpeg_is_decoded_again_without_pillow(encoding, monkeypatch):
    monkeypatch.setattr(pipeline.shards.images, "decode", None)
    assert decode_trusted(TINY[encoding]).shape == (17, 19, 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", TINY["png"][:60], TINY["jpeg_420"][:300]], ids=len)
def test_decoding_again_refuses_what_decode_refuses(data):
    with pytest.raises(Undecodable):
        decode_trusted(data)


@pytest.mark.parametrize(
    ("encoding", "components"),
    [(name, {"jpeg_grey": 1, "jpeg_cmyk": 4}.get(name, 3 if name in JPEGS else 0)) for name in ENCODINGS],
)
def test_components_of_a_jpeg_are_counted(encoding, components):
    assert jpeg_frame(TINY[encoding])[2] == components


@pytest.mark.parametrize("kind", UNUSUAL)
def test_components_of_an_unusual_jpeg_are_counted(kind):
    assert jpeg_frame(UNUSUAL[kind](Image.fromarray(natural(0, 20, 24)))) == (24, 20, 1 if "grey" in kind else 3)


@pytest.mark.parametrize("encoding", JPEGS)
def test_jpeg_cut_before_its_components_has_none(encoding):
    counts = [jpeg_frame(TINY[encoding][:cut])[2] for cut in range(len(TINY[encoding]))]
    assert counts == sorted(counts) and set(counts) == {0, jpeg_frame(TINY[encoding])[2]}


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xD9, 0xDA])
def test_jpeg_of_another_kind_or_without_a_frame_has_no_components(marker):
    other = TINY["jpeg_420"].replace(b"\xff\xc0", bytes([0xFF, marker]))
    assert jpeg_frame(other) == (0, 0, 0)


@property_settings
@given(st.binary(max_size=60).map(b"\xff\xd8\xff".__add__))
def test_components_of_garbage_are_counted_without_failing(data):
    assert 0 <= jpeg_frame(data)[2] <= 255


@pytest.mark.parametrize("tar", [pytest.param(IMAGENET, marks=needs(IMAGENET))], ids=["imagenet"])
def test_decoding_photographs_again_gives_the_same_pixels(tar):
    data = files(tar)
    assert len(data) == 250
    assert [i for i, each in enumerate(data) if not np.array_equal(decode_trusted(each), decode(each))] == []


# render


def off(size: int) -> Recipe:
    whole = {"scale": (1, 1), "ratio": (1, 1)}
    return Recipe(size=size, hflip=0, auto_augment=None, color_jitter=0, erase_prob=0, **whole)


PLAIN = ViewParams(crop=(0, 0, 48, 48), flip=False, ops=(), erase=None, noise_key=bytes(16))
ERASED = PLAIN._replace(erase=(5, 9, 30, 21), noise_key=bytes(range(16)))


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


@pytest.mark.parametrize("size", [64, 200], ids=str)
def test_view_shares_no_memory_with_its_image(size):
    image = natural(0, 64, 64)
    assert not np.shares_memory(render(image, draw_view(off(size), "key", 0, 64, 64), off(size)), image)


def test_render_writes_to_out_and_returns_it():
    recipe = Recipe(size=33, auto_augment="rand-m9-mstd0.5-p1-inc1", erase_prob=0.5)
    image = natural(0, 50, 40)
    for view in range(30):
        params = draw_view(recipe, "key", view, 50, 40)
        out = np.full((3, 33, 33), 7, np.uint8)
        assert render(image, params, recipe, out=out) is out
        assert np.array_equal(out, render(image, params, recipe))


def test_render_writes_to_nothing_but_out():
    pictures = np.full((3, 3, 48, 48), 7, np.uint8)
    render(natural(0, 48, 48), ERASED, off(48), out=pictures[1])
    assert pictures[1].any() and (pictures[::2] == 7).all()


def test_render_with_everything_off_of_an_image_of_its_size_is_the_image():
    image = natural(0, 64, 64)
    view = render(image, draw_view(off(64), "key", 3, 64, 64), off(64))
    assert np.array_equal(view, image.transpose(2, 0, 1))


def test_crop_of_the_views_size_is_cut_out_unchanged():
    image = natural(0, 90, 70)
    params = PLAIN._replace(crop=(30, 11, 48, 48))
    assert np.array_equal(render(image, params, off(48)), image[11:59, 30:78].transpose(2, 0, 1))


def test_flip_is_the_mirror():
    image = natural(0, 48, 48)
    flipped = render(image, PLAIN._replace(flip=True), off(48))
    assert np.array_equal(flipped, render(image, PLAIN, off(48))[:, :, ::-1])


def test_ops_are_applied_in_their_order():
    image = natural(0, 48, 48)
    ops = (("SolarizeAdd", 100), ("PosterizeIncreasing", 2))
    params = PLAIN._replace(ops=ops)
    expected = apply_op(apply_op(image, *ops[0], FILL), *ops[1], FILL).transpose(2, 0, 1)
    assert np.array_equal(render(image, params, off(48)), expected)


def test_geometry_uncovers_the_recipes_mean():
    params = PLAIN._replace(ops=(("TranslateXRel", 0.45),))
    view = render(natural(0, 48, 48), params, Recipe(size=48, mean=(0.1, 0.5, 0.9)))
    assert view[:, :, -15:].reshape(3, -1).T.tolist() == [[26, 128, 230]] * (15 * 48)


def erased_box(params: ViewParams = ERASED, seed: int = 0) -> np.ndarray:
    return render(natural(seed, 48, 48), params, off(48))[:, 9:30, 5:35]


def test_erasing_changes_only_its_box():
    image = natural(0, 48, 48)
    changed = render(image, ERASED, off(48)) != render(image, PLAIN, off(48))
    changed[:, 9:30, 5:35] = False
    assert not changed.any()


def test_erased_box_does_not_depend_on_the_image():
    assert np.array_equal(erased_box(), erased_box(seed=1))


def test_another_noise_key_erases_with_other_noise():
    other = ERASED._replace(noise_key=bytes(16))
    assert (erased_box() != erased_box(other)).mean() > 0.9


def test_erasing_noise_is_the_recipes_normal_clipped():
    recipe = Recipe(size=224, mean=(0.2, 0.5, 0.7), std=(0.1, 0.2, 0.3))
    params = ERASED._replace(crop=(0, 0, 224, 224), erase=(0, 0, 200, 200))
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

def digest_in_another_process(**environment: str) -> str:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    unset = {name: value for name, value in os.environ.items() if name != "OPENCV_IPP"}
    result = subprocess.run(
        [sys.executable, "-c", "import rendering; print(rendering.digest_of_views(1))"],
        env=unset | {"PYTHONPATH": path} | environment,
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


def test_views_rendered_with_one_thread_are_the_same_bytes(digest):
    assert digest_of_views(threads=1) == digest


def test_views_rendered_by_a_thread_are_the_same_bytes(digest):
    with ThreadPoolExecutor(1) as pool:  # OpenCV keeps some settings for each thread
        assert pool.submit(digest_of_views, 1).result() == digest


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_views_rendered_by_a_child_are_the_same_bytes(method, digest, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "12345")  # heeded by spawn
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(digest_of_views, (1,)).get(timeout=120) == digest


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param(
            {"OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2", "ATEN_CPU_CAPABILITY": "default"}, id="instructions"
        ),
        pytest.param({"OPENCV_IPP": "disabled"}, id="without_ipp"),
        pytest.param({}, id="as_it_is"),
    ],
)
def test_views_rendered_with_another_environment_are_the_same_bytes(environment, digest):
    assert digest_in_another_process(**environment) == digest


# resizing


@pytest.mark.parametrize("size", [(300, 200), (480, 640), (50, 60), (1, 30), (30, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("target", [(224, 224), (32, 32), (77, 300)], ids=str)
def test_resize_is_pillows_bicubic(size, target):
    image = natural(3, *size)
    theirs = np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
    off_by = np.abs(_resize(image, *target).transpose(1, 2, 0).astype(int) - theirs)
    assert off_by.max() <= 2 and off_by.mean() < 0.05


@property_settings
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
def test_resize_gives_contiguous_planes(width, height, new_width, new_height):
    view = _resize(natural(0, width, height), new_width, new_height)
    assert (view.shape, view.dtype, view.flags.c_contiguous) == ((3, new_height, new_width), np.uint8, True)


def test_resize_to_the_size_it_has_is_a_copy():
    image = natural(0, 40, 30)
    view = _resize(image, 40, 30)
    assert np.array_equal(view, image.transpose(2, 0, 1)) and not np.shares_memory(view, image)


@property_settings
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 20), st.integers(0, 20))
def test_resize_of_a_crop_does_not_depend_on_its_surroundings(width, height, left, top):
    image = natural(0, 90, 90)
    crop = image[top : top + height, left : left + width]
    assert np.array_equal(_resize(crop, 32, 32), _resize(crop.copy(), 32, 32))


def test_resize_takes_an_image_that_may_not_be_written_to():
    image = natural(0, 40, 30)
    locked = image.copy()
    locked.flags.writeable = False
    assert np.array_equal(_resize(locked, 20, 20), _resize(image, 20, 20))


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


# 40 views with three ops each, 8 of AutoAugment, 8 of colour jitter, 1 with AutoAugment's Solarize
GOLDEN_TEXTS = ["rand-m9-mstd0.5-n3-p1-inc1"] * 40 + ["original-mstd0.5"] * 8 + [None] * 8 + ["original-mstd0.5"]
GOLDEN_NUMBERS = [*range(48), *range(56, 65)]
GOLDEN_KEY = "golden123"
GOLDEN = ["ee6d1896", "213343f2", "3731357f", "07dd3ec0", "5051e76d", "95cf6190", "537b63fa", "4c3fabb4", "1c7725c3", "48a281fc", "2dc1eda8", "8482087d", "5ad7d086", "ac719f3f", "9c88b071", "e290deb2", "5c293508", "06ed751b", "b4c6bddc", "b7d7be8c", "79abefdb", "2c3e9ba4", "91a5a7da", "0c9e75e3", "f3fea1b9", "00023e54", "23331720", "1b10e023", "e2a938f0", "c152e2fe", "dce28e25", "ba5abe81", "efb89b86", "f9bb8bbc", "5641ced8", "1fd98bf8", "563e31a8", "d9fc34c9", "f5bdddf6", "e092bc22", "6cacdd73", "fee09fe1", "8a74fc8a", "ce50c451", "3064be88", "5b61b59e", "feaa0486", "ef48e629", "afef6670", "a43e91f9", "4ac7b5dd", "394ec1e2", "1ed6d555", "3cf1359d", "14c2d78d", "18df463a", "4c40c0de"]


def golden_params(key: str) -> list[ViewParams]:
    return [draw_view(golden_recipe(text), key, view, 160, 120) for view, text in zip(GOLDEN_NUMBERS, GOLDEN_TEXTS, strict=True)]


def golden_recipe(text: str | None) -> Recipe:
    return Recipe(size=96, auto_augment=text, erase_prob=0.25)


def shows_everything(key: str) -> bool:
    """Every increasing op, a flip and an erased box within 16 views; every op in all of them."""
    params = golden_params(key)
    first, all_ops = params[:16], {name for each in params for name, _ in each.ops}
    return (
        {name for each in first for name, _ in each.ops} == set(INCREASING_OPS)
        and len({each.flip for each in first}) == len({each.erase is None for each in first}) == 2
        and all_ops == set(OPS)
    )


def test_golden_views_show_every_op_a_flip_and_an_erased_box():
    other = (key for key in map("golden{}".format, range(10**6)) if shows_everything(key))
    assert shows_everything(GOLDEN_KEY), f"draws changed: record GOLDEN_KEY = {next(other)!r}"


def test_views_are_the_recorded_ones():
    image, digests = painted(160, 120), []
    for text, params in zip(GOLDEN_TEXTS, golden_params(GOLDEN_KEY), strict=True):
        digests.append(hashlib.blake2b(render(image, params, golden_recipe(text)), digest_size=4).hexdigest())
    changed = [view for view, digest in enumerate(digests) if GOLDEN[view : view + 1] != [digest]]
    lines = "\n".join(" ".join(digests[i : i + 8]) for i in range(0, 57, 8))
    advice = "if that is meant, bump VIEWS_VERSION in pipeline/views/draw.py and record"
    assert not changed, f'views {changed} changed; {advice}\nGOLDEN = """\n{lines}\n""".split()'
