"""Drawing: views, groups and mixing are functions of recipe and identity, distributed as timm's are."""

import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import pipeline.recipe
from pipeline.config import Recipe
from pipeline.recipe import (
    INCREASING_OPS,
    ViewParams,
    draw_groups,
    draw_mix,
    draw_view,
    group_check,
    op_argument,
    recipe_fingerprint,
    uniforms,
    witness,
)

DRAWS = 5000
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


@pytest.fixture
def seeded():
    """Global generators at a known seed, put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(7)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def plain(mix) -> tuple:
    return mix.kind, mix.lam, mix.box, mix.partner.tolist()


def draw_all() -> tuple:
    """One of everything that is drawn."""
    recipe = Recipe(seed=3)
    return (
        draw_view(recipe, "key", 5, 123, 77),
        [group.tolist() for group in draw_groups(recipe, "shard", 2, 200)],
        plain(draw_mix(recipe, "shard", 1, 5, 63)),
    )


# what is drawn depends on recipe and identity


def test_drawing_leaves_the_global_generators_as_they_were(seeded):
    before = global_states()
    draw_all()
    assert global_states() == before


def test_seeding_the_global_generators_changes_nothing_drawn(seeded):
    first = draw_all()
    seed_all(8)
    assert draw_all() == first


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


def test_uniforms_lie_strictly_between_0_and_1():
    numbers = uniforms(np.array([0, 1, 2**63, 2**64 - 1], np.uint64))
    assert all(0 < number < 1 for number in numbers), numbers


def test_fingerprint_of_the_recipe_heeds_the_version_of_the_views(monkeypatch):
    before = recipe_fingerprint(Recipe())
    monkeypatch.setattr(pipeline.recipe, "VIEWS_VERSION", pipeline.recipe.VIEWS_VERSION + 1)
    assert recipe_fingerprint(Recipe()) != before


# crops and erased boxes


@property_settings
@given(sides, sides, st.integers(0, 10**6))
def test_crop_lies_inside_the_image(width, height, view):
    left, top, w, h = draw_view(Recipe(), "key", view, width, height).crop
    assert 0 <= left < left + w <= width and 0 <= top < top + h <= height


@property_settings
@given(sides, sides, st.lists(st.floats(0.05, 20), min_size=2, max_size=2).map(sorted), st.integers(0, 99))
def test_crop_lies_inside_the_image_for_any_ratio(width, height, ratio, view):
    left, top, w, h = draw_view(Recipe(ratio=ratio), "key", view, width, height).crop
    assert 0 <= left < left + w <= width and 0 <= top < top + h <= height


def test_crop_of_ratio_2_is_twice_as_wide_as_high():
    recipe = Recipe(scale=(0.1, 0.1), ratio=(2, 2))
    assert {draw_view(recipe, "key", view, 1000, 800).crop[2:] for view in range(9)} == {(400, 200)}


@property_settings
@given(st.integers(8, 512), st.integers(0, 10**6))
def test_erased_box_lies_inside_the_view(size, view):
    left, top, w, h = draw_view(Recipe(size=size, erase_prob=1), "key", view, 300, 200).erase
    assert 0 <= left < left + w <= size and 0 <= top < top + h <= size


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (3000, 7), (1, 50)])
def test_crop_of_a_long_image_is_timms_central_one(width, height, timm_crop):
    left, top, w, h = draw_view(Recipe(), "key", 0, width, height).crop
    assert (top, left, h, w) == timm_crop(width, height)


# groups


@property_settings
@given(st.integers(0, 3000), st.integers(1, 64).map(lambda half: 2 * half), st.integers(0, 9))
def test_groups_hold_every_row_once(samples, group_size, block):
    groups = draw_groups(Recipe(group_size=group_size), "shard", block, samples)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(samples))


@property_settings
@given(st.integers(1, 3000), st.integers(1, 64).map(lambda half: 2 * half))
def test_groups_differ_in_size_by_one_at_most_and_fit(samples, group_size):
    sizes = [len(group) for group in draw_groups(Recipe(group_size=group_size), "shard", 0, samples)]
    assert max(sizes) <= group_size and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("shard", "block"), [("a", 1), ("b", 0)])
def test_another_block_or_shard_has_other_groups(shard, block):
    first = draw_groups(Recipe(), "a", 0, 128)
    assert not np.array_equal(first, draw_groups(Recipe(), shard, block, 128))


# mixing


@pytest.fixture(scope="module")
def mixes():
    return [draw_mix(Recipe(), "shard", 0, view, 64) for view in range(DRAWS)]


@property_settings
@given(st.integers(1, 64), st.integers(0, 10**6))
def test_partners_are_an_involution(members, view):
    partner = draw_mix(Recipe(), "shard", 0, view, members).partner
    assert np.array_equal(partner[partner], np.arange(64))


@property_settings
@given(st.integers(1, 64), st.integers(0, 10**6))
def test_unused_slots_name_themselves(members, view):
    partner = draw_mix(Recipe(), "shard", 0, view, members).partner
    assert partner[members:].tolist() == list(range(members, 64))


@property_settings
@given(st.integers(1, 64), st.integers(0, 10**6))
def test_of_the_members_an_odd_one_at_most_stays_alone(members, view):
    partner = draw_mix(Recipe(), "shard", 0, view, members).partner
    assert np.sum(partner[:members] == np.arange(members)) == members % 2


def test_lambda_is_a_fraction(mixes):
    assert all(0 <= mix.lam <= 1 for mix in mixes)


def test_mixup_lambda_is_a_multiple_of_a_65536th(mixes):
    assert all((mix.lam * 65536).is_integer() for mix in mixes if mix.kind == "mixup")


def test_cutmix_lambda_is_what_the_box_leaves(mixes):
    for mix in mixes:
        if mix.kind == "cutmix":
            covered = np.zeros((224, 224))
            left, top, width, height = mix.box
            covered[top : top + height, left : left + width] = 1
            assert mix.lam == pytest.approx(1 - covered.mean(), abs=1e-12)


def test_cutmix_box_lies_inside_the_view(mixes):
    for left, top, width, height in (mix.box for mix in mixes):
        assert 0 <= left <= left + width <= 224 and 0 <= top <= top + height <= 224


def test_mixup_has_no_box(mixes):
    assert {mix.box for mix in mixes if mix.kind == "mixup"} == {(0, 0, 0, 0)}


@pytest.mark.parametrize(("shard", "group", "view"), [("other", 0, 0), ("shard", 1, 0), ("shard", 0, 1)])
def test_each_group_and_view_is_mixed_in_its_own_way(shard, group, view):
    assert plain(draw_mix(Recipe(), shard, group, view, 64)) != plain(draw_mix(Recipe(), "shard", 0, 0, 64))


# switches


def kinds(**changes) -> set[str]:
    return {draw_mix(Recipe(**changes), "shard", 0, view, 64).kind for view in range(100)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"mixup", "cutmix"}),
        ({"mixup_alpha": 0, "cutmix_alpha": 0}, {"none"}),
        ({"mix_prob": 0}, {"none"}),
        ({"cutmix_alpha": 0}, {"mixup"}),
        ({"mixup_alpha": 0}, {"cutmix"}),
        ({"switch_prob": 0}, {"mixup"}),
        ({"switch_prob": 1}, {"cutmix"}),
    ],
)
def test_recipe_switches_the_kinds_of_mixing(changes, expected):
    assert kinds(**changes) == expected


def test_unmixed_group_keeps_every_picture_and_label():
    mix = draw_mix(Recipe(mix_prob=0), "shard", 0, 0, 64)
    assert plain(mix) == ("none", 1.0, (0, 0, 0, 0), list(range(64)))


@pytest.mark.parametrize(
    ("changes", "attribute", "off"),
    [
        ({"hflip": 0}, "flip", False),
        ({"hflip": 1}, "flip", True),
        ({"auto_augment": None}, "ops", ()),
        ({"auto_augment": "rand-m9-p0-inc1"}, "ops", ()),
        ({"erase_prob": 0}, "erase", None),
        ({"scale": (1, 1), "ratio": (1, 1)}, "crop", (0, 0, 90, 90)),
    ],
)
def test_recipe_switches_parts_of_a_view(changes, attribute, off):
    drawn = {getattr(draw_view(Recipe(**changes), "key", view, 90, 90), attribute) for view in range(200)}
    assert drawn == {off}


def test_erase_prob_1_erases_every_view():
    assert all(draw_view(Recipe(erase_prob=1), "key", view, 90, 90).erase for view in range(200))


# the check of a group


def check(keys=b"a\0b\0c\0", change=(0, 0, 0, 0), lam=0.0, swap=False, kind="cutmix"):
    mix = draw_mix(Recipe(group_size=8, switch_prob=1), "shard", 0, 0, 8)
    partner = mix.partner[::-1] if swap else mix.partner
    box = tuple(a + b for a, b in zip(mix.box, change, strict=True))
    picture = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    return group_check(keys, pipeline.recipe.Mix(kind, mix.lam + lam, box, partner), picture)


@pytest.mark.parametrize(
    "changed",
    [
        {"keys": b"b\0a\0c\0"},
        {"keys": b"a\0b\0"},
        {"lam": 1 / 65536},
        {"lam": -1 / 65536},
        {"change": (1, 0, 0, 0)},
        {"change": (0, 1, 0, 0)},
        {"change": (0, 0, 1, 0)},
        {"change": (0, 0, 0, 1)},
        {"swap": True},
        {"kind": "mixup"},
        {"kind": "none"},
    ],
    ids=str,
)
def test_group_check_changes_with_what_the_group_is(changed):
    assert check(**changed) != check()


@property_settings
@given(st.tuples(st.integers(0, 2), st.integers(0, 15), st.integers(0, 15)), st.integers(1, 255))
def test_group_check_changes_with_any_pixel(pixel, difference):
    mix = draw_mix(Recipe(group_size=8), "shard", 0, 0, 8)
    picture = np.full((3, 16, 16), 7, np.uint8)
    other = picture.copy()
    other[pixel] ^= difference
    assert group_check(b"key", mix, other) != group_check(b"key", mix, picture)


def test_group_check_is_a_function_of_values_not_of_memory_layout():
    mix = draw_mix(Recipe(group_size=8), "shard", 0, 0, 8)
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3).transpose(2, 0, 1)
    assert group_check(b"key", mix, picture) == group_check(b"key", mix, picture.copy(order="C"))


def test_group_check_has_64_bits():
    assert all(0 <= check(lam=i / 65536) < 2**64 for i in range(100))


@property_settings
@given(st.integers(0, 50), st.integers(1, 64), st.integers(0, 100))
def test_every_member_is_witness_in_as_many_views_as_there_are_members(group, members, first):
    seen = {witness(group, view, members) for view in range(first, first + members)}
    assert seen == set(range(members))


# the arguments of ops


def test_ops_are_timms_increasing_set_in_its_order():
    from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS

    assert list(INCREASING_OPS) == _RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("name", INCREASING_OPS)
def test_argument_of_an_op_is_timms(name, negate, monkeypatch):
    from timm.data import auto_augment

    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: -value if negate else value)
    level_to_arg = auto_augment.LEVEL_TO_ARG[name] or (lambda magnitude, hparams: (None,))
    for magnitude in np.linspace(0, 10, 201).tolist():
        assert op_argument(name, magnitude, negate) == pytest.approx(level_to_arg(magnitude, {})[0])


# distributions


@pytest.fixture(scope="module")
def views() -> list[ViewParams]:
    return [draw_view(Recipe(), f"n{i:08d}", i % 7, WIDTH, HEIGHT) for i in range(DRAWS)]


@pytest.fixture
def timm_crop(seeded):
    """(width, height) -> top, left, height, width of timm's random resized crop."""
    from PIL import Image
    from timm.data.transforms import RandomResizedCropAndInterpolation

    def crop(width: int, height: int) -> tuple:
        image = Image.new("1", (width, height))
        return RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))

    return crop


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(lambda left, top, w, h: w * h / (WIDTH * HEIGHT), id="area"),
        pytest.param(lambda left, top, w, h: math.log(w / h), id="log_aspect"),
        pytest.param(lambda left, top, w, h: left, id="left"),
        pytest.param(lambda left, top, w, h: top, id="top"),
    ],
)
def test_crops_are_distributed_as_timms(measure, views, timm_crop):
    theirs = []
    for _ in range(DRAWS):
        top, left, h, w = timm_crop(WIDTH, HEIGHT)
        theirs.append(measure(left, top, w, h))
    assert stats.ks_2samp([measure(*view.crop) for view in views], theirs).pvalue > LIKELY


class _Slices:
    """Stands for a picture that timm erases, and records where."""

    def __setitem__(self, where, _):
        _, rows, columns = where
        self.box = columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(lambda left, top, w, h: w * h, id="area"),
        pytest.param(lambda left, top, w, h: math.log(h / w), id="log_aspect"),
        pytest.param(lambda left, top, w, h: left, id="left"),
        pytest.param(lambda left, top, w, h: top, id="top"),
    ],
)
def test_erased_boxes_are_distributed_as_timms(measure, seeded):
    from timm.data.random_erasing import RandomErasing

    eraser, picture, theirs = RandomErasing(probability=1, mode="const", device="cpu"), _Slices(), []
    for _ in range(DRAWS):
        eraser._erase(picture, 3, 224, 224, torch.uint8)
        theirs.append(measure(*picture.box))
    recipe = Recipe(erase_prob=1)
    ours = [measure(*draw_view(recipe, "key", view, 9, 9).erase) for view in range(DRAWS)]
    assert stats.ks_2samp(ours, theirs).pvalue > LIKELY


def test_a_quarter_of_the_views_is_erased(views):
    assert stats.binomtest(sum(view.erase is not None for view in views), DRAWS, 0.25).pvalue > LIKELY


def test_half_of_the_views_is_flipped(views):
    assert stats.binomtest(sum(view.flip for view in views), DRAWS, 0.5).pvalue > LIKELY


def test_ops_are_chosen_uniformly(views):
    counts = Counter(name for view in views for name, _ in view.ops)
    assert stats.chisquare([counts[name] for name in INCREASING_OPS]).pvalue > LIKELY


def test_no_two_or_one_op_fires_as_two_coins_fall(views):
    counts = Counter(len(view.ops) for view in views)
    expected = [DRAWS / 4, DRAWS / 2, DRAWS / 4]
    assert stats.chisquare([counts[n] for n in range(3)], expected).pvalue > LIKELY


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-p1-inc1", "rand-m4-mstd3-p1-inc1", "rand-m7-mstd101-p1-inc1"]
)
def test_magnitudes_are_distributed_as_timms(text, seeded):
    from timm.data.auto_augment import rand_augment_transform

    theirs = []
    operation = rand_augment_transform(text).ops[0]
    operation.level_fn = lambda magnitude, hparams: theirs.append(magnitude) or ()
    operation.aug_fn = lambda image, **_: image
    for _ in range(DRAWS):
        operation(None)
    recipe = Recipe(auto_augment=text)
    ops = [op for view in range(3 * DRAWS) for op in draw_view(recipe, "key", view, 9, 9).ops]
    ours = [abs(degrees) / 3 for name, degrees in ops if name == "Rotate"]
    # rounded, because both have ties at 0 and 10, and ours come back from degrees
    assert stats.ks_2samp(np.round(ours, 4), np.round(theirs, 4)).pvalue > LIKELY


def test_signs_are_fair(views):
    signs = [argument > 0 for view in views for name, argument in view.ops if name in ("Rotate", "ShearX")]
    assert stats.binomtest(sum(signs), len(signs), 0.5).pvalue > LIKELY


def test_half_of_the_groups_is_cut(mixes):
    assert stats.binomtest(sum(mix.kind == "cutmix" for mix in mixes), DRAWS, 0.5).pvalue > LIKELY


def test_groups_are_mixed_with_their_probability():
    recipe = Recipe(mix_prob=0.3)
    mixed = sum(draw_mix(recipe, "shard", 0, view, 64).kind != "none" for view in range(DRAWS))
    assert stats.binomtest(mixed, DRAWS, 0.3).pvalue > LIKELY


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_mixup_lambdas_are_distributed_as_numpys_beta(alpha):
    recipe = Recipe(mixup_alpha=alpha, cutmix_alpha=0)
    ours = [draw_mix(recipe, "shard", 0, view, 64).lam for view in range(DRAWS)]
    theirs = np.round(np.random.default_rng(5).beta(alpha, alpha, DRAWS) * 65536) / 65536
    assert stats.ks_2samp(ours, theirs).pvalue > LIKELY


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(lambda lam, left, top, w, h: lam, id="lam"),
        pytest.param(lambda lam, left, top, w, h: left, id="left"),
        pytest.param(lambda lam, left, top, w, h: top + h, id="bottom"),
    ],
)
def test_cutmix_boxes_are_distributed_as_timms(measure, seeded):
    from timm.data.mixup import cutmix_bbox_and_lam

    theirs = []
    for _ in range(DRAWS):
        (top, bottom, left, right), lam = cutmix_bbox_and_lam((3, 224, 224), np.random.beta(1, 1))
        theirs.append(measure(lam, left, top, right - left, bottom - top))
    mixes = [draw_mix(Recipe(switch_prob=1), "shard", 0, view, 64) for view in range(DRAWS)]
    assert stats.ks_2samp([measure(mix.lam, *mix.box) for mix in mixes], theirs).pvalue > LIKELY


def test_partners_are_drawn_uniformly():
    recipe = Recipe(group_size=8)
    counts = Counter(int(draw_mix(recipe, "shard", 0, view, 8).partner[0]) for view in range(DRAWS))
    assert stats.chisquare([counts[slot] for slot in range(1, 8)]).pvalue > LIKELY


def test_groups_of_a_row_are_drawn_uniformly():
    counts = Counter()
    for block in range(2000):
        groups = draw_groups(Recipe(group_size=32), "shard", block, 128)
        counts[next(i for i, group in enumerate(groups) if 0 in group)] += 1
    assert stats.chisquare([counts[i] for i in range(4)]).pvalue > LIKELY


def test_successive_views_are_not_correlated():
    areas = [math.prod(draw_view(Recipe(), "key", view, 500, 500).crop[2:]) for view in range(DRAWS)]
    assert stats.pearsonr(areas[:-1], areas[1:]).pvalue > LIKELY


# golden values: a change of any bumps VIEWS_VERSION

GOLDEN_VIEWS = {
    1: ViewParams(
        crop=(15, 93, 146, 141),
        flip=True,
        ops=(("ContrastIncreasing", 1.7825657653808593), ("ShearY", -0.28251800537109373)),
        erase=None,
        noise_key=bytes.fromhex("1cc4c23039dcb1db360ef9baa825211f"),
    ),
    2: ViewParams(
        crop=(240, 112, 210, 219),
        flip=False,
        ops=(("ShearX", 0.2564094543457031),),
        erase=(145, 20, 65, 139),
        noise_key=bytes.fromhex("5649d9bd4c19e13b63ac0c733e27e1fe"),
    ),
    7: ViewParams(
        crop=(69, 42, 360, 315),
        flip=False,
        ops=(("SolarizeAdd", 106), ("AutoContrast", None)),
        erase=(67, 144, 133, 72),
        noise_key=bytes.fromhex("0be281212b95277c333feab7e33b266f"),
    ),
    36: ViewParams(
        crop=(33, 32, 327, 308),
        flip=True,
        ops=(("Rotate", 25.167572021484375), ("BrightnessIncreasing", 1.7004869079589844)),
        erase=None,
        noise_key=bytes.fromhex("93d13ac9d4ffeb0213a34ca98789f0e7"),
    ),
}

GOLDEN_MIXES = {
    0: ("cutmix", 0.4446747448979592, (62, 8, 162, 172), [3, 2, 1, 0, 6, 5, 4, 7]),
    1: ("mixup", 0.2781524658203125, (0, 0, 0, 0), [0, 5, 4, 6, 2, 1, 3, 7]),
    2: ("cutmix", 0.6029974489795918, (58, 104, 166, 120), [6, 1, 3, 2, 5, 4, 0, 7]),
    3: ("mixup", 0.7905120849609375, (0, 0, 0, 0), [3, 2, 1, 0, 5, 4, 6, 7]),
}


@pytest.mark.parametrize("view", GOLDEN_VIEWS)
def test_view_is_the_recorded_one(view):
    assert draw_view(Recipe(), "n01440764_10026", view, WIDTH, HEIGHT) == GOLDEN_VIEWS[view]


@pytest.mark.parametrize("view", GOLDEN_MIXES)
def test_mix_is_the_recorded_one(view):
    assert plain(draw_mix(Recipe(group_size=8), "train-000003.tar", 2, view, 7)) == GOLDEN_MIXES[view]


def test_groups_are_the_recorded_ones():
    groups = draw_groups(Recipe(group_size=4), "train-000003.tar", 1, 10)
    assert [group.tolist() for group in groups] == [[2, 5, 0, 8], [1, 3, 4], [6, 9, 7]]
