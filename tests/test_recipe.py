"""Drawing views: functions of recipe and identity alone, distributed as timm's and torchvision's are."""

import contextlib
import itertools
import math
import operator
import os
import pickle
import pprint
import random
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import pipeline.views.draw
from pipeline.common.streams import noise_words, permutation, philox, raw_words, uniforms
from pipeline.config.schema import Recipe
from pipeline.views.draw import ViewParams, draw_groups, draw_mix, draw_view, recipe_fingerprint

DRAWS = 20_000
WIDTH, HEIGHT = 500, 375
LIKELY = 1e-3  # the seeds are fixed: a p-value below this is a wrong distribution

property_settings = settings(derandomize=True, deadline=None, max_examples=100)
sides = st.integers(1, 3000)


def global_states() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


def seed_all(seed: int):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int = 7):
    """Inside, the global generators start from a known seed; they are put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(seed)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def same_distribution(ours, theirs) -> bool:
    """Of numbers, by Kolmogorov and Smirnov."""
    return stats.ks_2samp(ours, theirs).pvalue > LIKELY


def same_frequencies(ours: Counter, theirs: Counter) -> bool:
    """Of two samples' values, by chi squared; what is rare in both counts as one value."""
    rare = {value for value in ours | theirs if ours[value] + theirs[value] < 20}
    values = sorted((ours | theirs).keys() - rare)
    table = [[*(counts[v] for v in values), sum(counts[v] for v in rare)] for counts in (ours, theirs)]
    table = np.array(table)
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > LIKELY


def check_recorded(name: str, found: dict, recorded: dict, same=operator.eq):
    """Of golden values: says which changed, and what to write over them if that is meant."""
    wrong = [key for key in found if not same(found[key], recorded.get(key))]
    text = "".join(f"{key!r}: {pprint.pformat(found[key], width=64, compact=True)},\n" for key in found)
    text = textwrap.indent(text, "    ").replace("'", '"')
    advice = "if that is meant, bump VIEWS_VERSION in pipeline/views/draw.py and record"
    assert not wrong, f"changed: {wrong}; {advice}\n{name} = {{\n{text}}}  # fmt: skip"


def plain(mix) -> tuple:
    return mix.method, mix.lam, mix.box, mix.partner.tolist()


def draw_all() -> tuple:
    """One of everything that is drawn."""
    recipe = Recipe(seed=3)
    return (
        draw_view(recipe, "key", 5, 123, 77),
        draw_view(recipe.model_copy(update={"auto_augment": "original-mstd0.5"}), "key", 5, 123, 77),
        draw_view(recipe.model_copy(update={"auto_augment": None}), "key", 5, 123, 77),
        [group.tolist() for group in draw_groups(recipe, "shard", 2, 200)],
        plain(draw_mix(recipe, "shard", 1, 5, 63)),
    )


# what is drawn depends on recipe and identity


def springs(*_, **__):
    raise AssertionError("a global generator is used")


class Trap:
    """Stands for torch's default generator."""

    __getattr__ = __call__ = springs


TORCHS = (
    "seed", "manual_seed", "initial_seed", "get_rng_state", "set_rng_state", "rand", "randn", "randint",
    "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "multinomial", "poisson",
)  # fmt: skip


def set_traps(patch: pytest.MonkeyPatch):
    """Whatever draws from a global generator, or seeds or reads one, raises."""
    for name, value in vars(random).items():
        if getattr(value, "__self__", None) is random._inst:
            patch.setattr(random, name, springs)
    for name in dir(np.random.RandomState):
        if not name.startswith("_") and hasattr(np.random, name):
            patch.setattr(np.random, name, springs)
    for name in TORCHS:
        patch.setattr(torch, name, springs)
    for name in ("random_", "uniform_", "normal_", "bernoulli_", "exponential_", "multinomial"):
        patch.setattr(torch.Tensor, name, springs)
    patch.setattr(torch, "default_generator", Trap())
    # the system's noise is no better
    patch.setattr(np.random, "default_rng", springs)
    patch.setattr(os, "urandom", springs)
    for name in ("randu", "randn", "randShuffle", "setRNGSeed"):
        patch.setattr(cv2, name, springs)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.random(),
        lambda: random.seed(1),
        lambda: np.random.rand(3),
        lambda: np.random.seed(1),
        lambda: np.random.beta(1, 1),
        lambda: np.random.permutation(3),
        lambda: np.random.choice(3),
        lambda: torch.rand(3),
        lambda: torch.manual_seed(1),
        lambda: torch.empty(3).uniform_(0, 1),
        lambda: torch.default_generator.seed(),
        lambda: cv2.randu(np.zeros(3), 0, 1),
    ],
)
def test_trap_springs(draw):
    with pytest.MonkeyPatch.context() as patch:
        set_traps(patch)
        with pytest.raises(AssertionError, match="global generator"):
            draw()


def test_nothing_that_is_drawn_or_rendered_touches_a_global_generator():
    from pipeline.config.policies import op_argument
    from pipeline.views.ops import OPS, apply_op
    from pipeline.views.render import render

    image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    before = global_states()
    with pytest.MonkeyPatch.context() as patch:
        set_traps(patch)
        draw_all()
        for text in ("rand-m9-mstd0.5-n3-p1-inc1", "original-mstd0.5", None):
            # a mean of its own: nothing of this recipe has been kept
            recipe = Recipe(auto_augment=text, erase_prob=1, size=32, mean=(0.1, 0.2, 0.3))
            for view in range(10):
                render(image, draw_view(recipe, "key", view, 50, 40), recipe)
        for name in OPS:
            apply_op(image[:, :40], name, op_argument(name, 9, False), (1, 2, 3))
    assert global_states() == before


def test_seeding_the_global_generators_changes_nothing_drawn():
    drawn = []
    for seed in (7, 8):
        with seeded(seed):
            drawn.append(draw_all())
    assert drawn[0] == drawn[1]


def test_several_threads_at_once_draw_what_one_draws():
    views = range(2000)

    def draw(view):
        return draw_view(Recipe(), "key", view, WIDTH, HEIGHT), noise_words(bytes(16), 50).tolist()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, views)) == list(map(draw, views))


def test_drawing_other_things_between_changes_nothing_drawn():
    first = draw_all()
    for view in range(20):
        draw_view(Recipe(), "other", view, 50, 60)
        draw_mix(Recipe(mixup_alpha=0.3), "other", 0, view, 10)
    assert draw_all() == first


def test_views_of_a_key_differ():
    assert len({draw_view(Recipe(), "key", view, WIDTH, HEIGHT) for view in range(300)}) == 300


def test_views_of_different_keys_differ():
    assert len({draw_view(Recipe(), f"key{i}", 0, WIDTH, HEIGHT) for i in range(300)}) == 300


def test_key_and_view_number_do_not_run_together():
    one, other = draw_view(Recipe(), "key1", 1, WIDTH, HEIGHT), draw_view(Recipe(), "key", 11, WIDTH, HEIGHT)
    assert one.crop != other.crop and one.noise_key != other.noise_key


def test_views_of_different_seeds_differ():
    assert len({draw_view(Recipe(seed=seed), "key", 0, WIDTH, HEIGHT) for seed in range(300)}) == 300


def test_size_of_the_view_changes_no_crop_flip_or_op():
    for view in range(100):
        small = draw_view(Recipe(size=224), "key", view, WIDTH, HEIGHT)
        large = draw_view(Recipe(size=384), "key", view, WIDTH, HEIGHT)
        assert (small.crop, small.flip, small.ops) == (large.crop, large.flip, large.ops)


def test_noise_of_each_view_has_its_own_key():
    keys = {draw_view(Recipe(), key, view, 9, 9).noise_key for key in "ab" for view in range(100)}
    assert len(keys) == 200


@pytest.mark.parametrize("stream", [0, 1, 2**63 - 1])
def test_raw_words_are_those_of_a_new_generator_at_the_streams_counter(stream):
    key = bytes(range(16))
    raw_words(bytes(16), 7, stream=5)  # so that the generator of this thread has been elsewhere
    fresh = np.random.Philox(key=np.frombuffer(key, "<u8"), counter=[0, stream, 0, 0])
    assert np.array_equal(raw_words(key, 50, stream), fresh.random_raw(50))


def test_noise_comes_from_other_words_than_the_parameters():
    key = draw_view(Recipe(), "key", 0, 9, 9).noise_key
    noise = noise_words(key, 4 * 50_000).view("<u8")
    assert not np.isin(raw_words(key, 50_000), noise).any()


def test_fewer_noise_words_are_the_first_ones():
    assert np.array_equal(noise_words(bytes(16), 101), noise_words(bytes(16), 1000)[:101])


def test_noise_words_are_uniform():
    words = noise_words(bytes(16), 2**20)
    assert stats.chisquare(np.bincount(words >> 6, minlength=1024)).pvalue > LIKELY


@property_settings
@given(st.binary(min_size=16, max_size=16), st.integers(0, 500))
def test_permutation_is_the_stable_order_of_raw_words(key, length):
    words = philox(key).random_raw(length).tolist()
    assert permutation(key, length).tolist() == sorted(range(length), key=words.__getitem__)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-n3-p1-inc1", "original-mstd0.5", None])
def test_each_word_decides_one_part_of_a_view(text, monkeypatch):
    recipe = Recipe(auto_augment=text, erase_prob=1)
    changed = Counter()
    for view in range(40):
        view_words = raw_words(view.to_bytes(16), 80)
        parts = []
        for word in range(81):  # the last is none
            words = np.where(np.arange(80) == word, ~view_words, view_words)
            monkeypatch.setattr(pipeline.views.draw, "raw_words", lambda key, count, words=words: words[:count])
            params = draw_view(recipe, "key", view, 500, 375)
            parts.append((params.crop, params.flip, params.erase, params.ops))
        for other in parts[:-1]:
            changed[tuple(a != b for a, b in zip(parts[-1], other, strict=True))] += 1
    assert all(sum(which) <= 1 for which in changed) and len(changed) == 5, changed


def test_uniforms_lie_strictly_between_0_and_1():
    numbers = uniforms(np.array([0, 1, 2**63, 2**64 - 1], np.uint64))
    assert all(0 < number < 1 for number in numbers), numbers


def test_fingerprint_of_the_recipe_depends_on_the_version_of_the_views(monkeypatch):
    before = recipe_fingerprint(Recipe())
    monkeypatch.setattr(pipeline.views.draw, "VIEWS_VERSION", pipeline.views.draw.VIEWS_VERSION + 1)
    assert recipe_fingerprint(Recipe()) != before


# crops and erased boxes


@property_settings
@given(sides, sides, st.integers(0, 10**6))
def test_crop_is_inside_the_image(width, height, view):
    left, top, w, h = draw_view(Recipe(), "key", view, width, height).crop
    assert 0 <= left < left + w <= width and 0 <= top < top + h <= height


@property_settings
@given(sides, sides, st.lists(st.floats(0.05, 20), min_size=2, max_size=2).map(sorted), st.integers(0, 99))
def test_crop_is_inside_the_image_for_any_ratio(width, height, ratio, view):
    left, top, w, h = draw_view(Recipe(ratio=ratio), "key", view, width, height).crop
    assert 0 <= left < left + w <= width and 0 <= top < top + h <= height


def test_crop_of_ratio_2_is_twice_as_wide_as_high():
    recipe = Recipe(scale=(0.1, 0.1), ratio=(2, 2))
    assert {draw_view(recipe, "key", view, 1000, 800).crop[2:] for view in range(9)} == {(400, 200)}


@property_settings
@given(st.integers(8, 512), st.integers(0, 10**6))
def test_erased_box_is_inside_the_view(size, view):
    left, top, w, h = draw_view(Recipe(size=size, erase_prob=1), "key", view, 300, 200).erase
    assert 0 <= left < left + w <= size and 0 <= top < top + h <= size


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (3000, 7), (1, 50)])
def test_crop_of_a_long_image_is_timms_central_one(width, height):
    assert draw_view(Recipe(), "key", 0, width, height).crop == timm_crop(width, height)


# switches


@pytest.mark.parametrize(
    ("changes", "attribute", "off"),
    [
        ({"hflip": 0}, "flip", False),
        ({"hflip": 1}, "flip", True),
        ({"auto_augment": None, "color_jitter": 0}, "ops", ()),
        ({"auto_augment": "rand-m9-p0-inc1"}, "ops", ()),
        ({"erase_prob": 0}, "erase", None),
        ({"scale": (1, 1), "ratio": (1, 1)}, "crop", (0, 0, 90, 90)),
    ],
)
def test_recipe_switches_parts_of_a_view(changes, attribute, off):
    drawn = {getattr(draw_view(Recipe(**changes), "key", view, 90, 90), attribute) for view in range(200)}
    assert drawn == {off}


def test_policy_changes_no_crop_flip_or_erased_box():
    recipes = [Recipe(auto_augment=text) for text in (None, "rand-n5-inc1", "original-mstd0.5")]
    for view in range(100):
        drawn = [draw_view(recipe, "key", view, WIDTH, HEIGHT)._replace(ops=()) for recipe in recipes]
        assert drawn == drawn[:1] * 3


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "original"])
def test_colour_jitter_is_inert_next_to_a_policy(text):
    for view in range(100):
        some, none = (Recipe(auto_augment=text, color_jitter=strength) for strength in (0.9, 0))
        assert draw_view(some, "key", view, 90, 90) == draw_view(none, "key", view, 90, 90)


def test_erase_prob_1_erases_every_view():
    assert all(draw_view(Recipe(erase_prob=1), "key", view, 90, 90).erase for view in range(200))


# distributions


@pytest.fixture(scope="module")
def views() -> list[ViewParams]:
    return [draw_view(Recipe(), f"n{i:08d}", i % 7, WIDTH, HEIGHT) for i in range(DRAWS)]


def timm_crop(width: int, height: int) -> tuple:
    """left, top, width, height of timm's random resized crop."""
    from timm.data.transforms import RandomResizedCropAndInterpolation

    image = Image.new("1", (width, height))
    top, left, h, w = RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
    return left, top, w, h


@pytest.fixture(scope="module")
def timm_crops() -> list[tuple]:
    with seeded():
        return [timm_crop(WIDTH, HEIGHT) for _ in range(DRAWS)]


BOX_MEASURES = {
    "area": lambda left, top, w, h: w * h,
    "log_aspect": lambda left, top, w, h: math.log(w / h),
    "left": lambda left, top, w, h: left,
    "top": lambda left, top, w, h: top,
    "right": lambda left, top, w, h: left + w,
}


@pytest.mark.parametrize("measure", BOX_MEASURES)
def test_crops_are_distributed_as_timms(measure, views, timm_crops):
    ours, theirs = [view.crop for view in views], timm_crops
    assert same_distribution(*([BOX_MEASURES[measure](*box) for box in boxes] for boxes in (ours, theirs)))


class _Slices:
    """Stands for a picture that timm erases, and records where."""

    def __setitem__(self, where, _):
        _, rows, columns = where
        self.box = columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start


@pytest.fixture(scope="module")
def erased() -> tuple[list[tuple], list[tuple]]:
    """Boxes of ours and timm's."""
    from timm.data.random_erasing import RandomErasing

    eraser, picture, theirs = RandomErasing(probability=1, mode="const", device="cpu"), _Slices(), []
    with seeded():
        for _ in range(DRAWS):
            eraser._erase(picture, 3, 224, 224, torch.uint8)
            theirs.append(picture.box)
    recipe = Recipe(erase_prob=1)
    return [draw_view(recipe, "key", view, 9, 9).erase for view in range(DRAWS)], theirs


@pytest.mark.parametrize("measure", BOX_MEASURES)
def test_erased_boxes_are_distributed_as_timms(measure, erased):
    assert same_distribution(*([BOX_MEASURES[measure](*box) for box in boxes] for boxes in erased))


def test_a_quarter_of_the_views_is_erased(views):
    assert stats.binomtest(sum(view.erase is not None for view in views), DRAWS, 0.25).pvalue > LIKELY


def test_half_of_the_views_is_flipped(views):
    assert stats.binomtest(sum(view.flip for view in views), DRAWS, 0.5).pvalue > LIKELY


def test_successive_views_are_not_correlated():
    areas = [math.prod(draw_view(Recipe(), "key", view, 500, 500).crop[2:]) for view in range(DRAWS)]
    assert stats.pearsonr(areas[:-1], areas[1:]).pvalue > LIKELY


@pytest.mark.parametrize("parts", list(itertools.combinations(range(4), 2)), ids=str)
def test_parts_of_a_view_are_not_correlated(parts, views):
    numbers = [(view.flip, view.erase is None, len(view.ops), math.prod(view.crop[2:])) for view in views]
    assert stats.pearsonr(*np.array(numbers)[:, parts].T).pvalue > LIKELY


# golden values

GOLDEN_VIEWS = {
    ("rand-m9-mstd0.5-inc1", 1): ((15, 93, 146, 141), True,
     (("ContrastIncreasing", 1.782470703125),
      ("ShearY", -0.28251800537109373)),
     None, "cef36fa29322cca9fdb9d34169055b94"),
    ("rand-m9-mstd0.5-inc1", 2): ((240, 112, 210, 219), False, (("ShearX", 0.2564094543457031),),
     (145, 20, 65, 139), "25b943d2ed01eec63e7f6f1f0e9dcccd"),
    ("rand-m9-mstd0.5-inc1", 7): ((69, 42, 360, 315), False,
     (("SolarizeAdd", 106), ("AutoContrast", None)),
     (67, 144, 133, 72), "0359e1fb8be6f832be8e9d28c97df2ef"),
    ("original-mstd0.5", 1): ((15, 93, 146, 141), True, (("Equalize", None),), None,
     "cef36fa29322cca9fdb9d34169055b94"),
    ("original-mstd0.5", 2): ((240, 112, 210, 219), False, (("Equalize", None),),
     (145, 20, 65, 139), "25b943d2ed01eec63e7f6f1f0e9dcccd"),
    ("original-mstd0.5", 7): ((69, 42, 360, 315), False, (("Solarize", 100),),
     (67, 144, 133, 72), "0359e1fb8be6f832be8e9d28c97df2ef"),
    (None, 1): ((15, 93, 146, 141), True,
     (("Color", 1.04638671875), ("Contrast", 0.904052734375),
      ("Brightness", 0.862548828125)),
     None, "cef36fa29322cca9fdb9d34169055b94"),
    (None, 2): ((240, 112, 210, 219), False,
     (("Color", 0.72265625), ("Brightness", 1.267333984375),
      ("Contrast", 0.857177734375)),
     (145, 20, 65, 139), "25b943d2ed01eec63e7f6f1f0e9dcccd"),
    (None, 7): ((69, 42, 360, 315), False,
     (("Contrast", 0.964111328125), ("Brightness", 0.705322265625),
      ("Color", 1.240478515625)),
     (67, 144, 133, 72), "0359e1fb8be6f832be8e9d28c97df2ef"),
}  # fmt: skip


def test_views_are_the_recorded_ones():
    drawn = {}
    for text in ("rand-m9-mstd0.5-inc1", "original-mstd0.5", None):
        for view in (1, 2, 7):
            params = draw_view(Recipe(auto_augment=text), "n01440764_10026", view, WIDTH, HEIGHT)
            drawn[text, view] = (*params[:-1], params.noise_key.hex())
    check_recorded("GOLDEN_VIEWS", drawn, GOLDEN_VIEWS)
