"""Groups and their mixing: functions of recipe and identity, distributed as timm's; the check of a group."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_recipe import DRAWS, LIKELY, check_recorded, plain, property_settings, same_distribution, seeded

from pipeline.batches.batch import Batch, checked_member, group_check, mixed
from pipeline.batches.plan import Item
from pipeline.config.schema import Recipe
from pipeline.views.draw import Mix, draw_groups, draw_mix

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
    assert all((mix.lam * 65536).is_integer() for mix in mixes if mix.method == "mixup")


def test_cutmix_lambda_is_what_the_box_leaves(mixes):
    for mix in mixes:
        if mix.method == "cutmix":
            covered = np.zeros((224, 224))
            left, top, width, height = mix.box
            covered[top : top + height, left : left + width] = 1
            assert mix.lam == pytest.approx(1 - covered.mean(), abs=1e-12)


def test_cutmix_box_is_inside_the_view(mixes):
    for left, top, width, height in (mix.box for mix in mixes):
        assert 0 <= left <= left + width <= 224 and 0 <= top <= top + height <= 224


def test_mixup_has_no_box(mixes):
    assert {mix.box for mix in mixes if mix.method == "mixup"} == {(0, 0, 0, 0)}


@pytest.mark.parametrize(("shard", "group", "view"), [("other", 0, 0), ("shard", 1, 0), ("shard", 0, 1)])
def test_each_group_and_view_is_mixed_in_its_own_way(shard, group, view):
    assert plain(draw_mix(Recipe(), shard, group, view, 64)) != plain(draw_mix(Recipe(), "shard", 0, 0, 64))


def methods(**changes) -> set[str]:
    return {draw_mix(Recipe(**changes), "shard", 0, view, 64).method for view in range(100)}


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
def test_recipe_switches_the_methods_of_mixing(changes, expected):
    assert methods(**changes) == expected


def test_unmixed_group_keeps_every_picture_and_label():
    mix = draw_mix(Recipe(mix_prob=0), "shard", 0, 0, 64)
    assert plain(mix) == ("none", 1.0, (0, 0, 0, 0), list(range(64)))


def test_half_of_the_groups_is_cut(mixes):
    assert stats.binomtest(sum(mix.method == "cutmix" for mix in mixes), DRAWS, 0.5).pvalue > LIKELY


def test_groups_are_mixed_with_their_probability():
    recipe = Recipe(mix_prob=0.3)
    mixed = sum(draw_mix(recipe, "shard", 0, view, 64).method != "none" for view in range(DRAWS))
    assert stats.binomtest(mixed, DRAWS, 0.3).pvalue > LIKELY


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_mixup_lambdas_are_distributed_as_numpys_beta(alpha):
    recipe = Recipe(mixup_alpha=alpha, cutmix_alpha=0)
    ours = [draw_mix(recipe, "shard", 0, view, 64).lam for view in range(DRAWS)]
    theirs = np.round(np.random.default_rng(5).beta(alpha, alpha, DRAWS) * 65536) / 65536
    assert same_distribution(ours, theirs)


@pytest.fixture(scope="module")
def cut() -> tuple[list[tuple], list[tuple]]:
    """(lambda, left, top, right, bottom) of CutMix, ours and timm's."""
    from timm.data.mixup import cutmix_bbox_and_lam

    ours, theirs = [], []
    for view in range(DRAWS):
        mix = draw_mix(Recipe(switch_prob=1), "shard", 0, view, 64)
        left, top, width, height = mix.box
        ours.append((mix.lam, left, top, left + width, top + height))
    with seeded():
        for _ in range(DRAWS):
            (top, bottom, left, right), lam = cutmix_bbox_and_lam((3, 224, 224), np.random.beta(1, 1))
            theirs.append((lam, left, top, right, bottom))
    return ours, theirs


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(lambda lam, left, top, right, bottom: lam, id="lam"),
        pytest.param(lambda lam, left, top, right, bottom: left, id="left"),
        pytest.param(lambda lam, left, top, right, bottom: bottom, id="bottom"),
        pytest.param(lambda lam, left, top, right, bottom: (right - left) * (bottom - top), id="area"),
        pytest.param(lambda lam, left, top, right, bottom: (right - left) - (bottom - top), id="aspect"),
    ],
)
def test_cutmix_boxes_are_distributed_as_timms(measure, cut):
    assert same_distribution(*([measure(*drawn) for drawn in boxes] for boxes in cut))


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


# the check of a group


def check(keys=b"a\0b\0c\0", change=(0, 0, 0, 0), lam=0.0, swap=False, method="cutmix"):
    mix = draw_mix(Recipe(group_size=8, switch_prob=1), "shard", 0, 0, 8)
    partner = mix.partner[::-1] if swap else mix.partner
    box = tuple(a + b for a, b in zip(mix.box, change, strict=True))
    picture = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    return group_check(keys, Mix(method, mix.lam + lam, box, partner), picture)


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
        {"method": "mixup"},
        {"method": "none"},
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
    seen = {checked_member(group, view, members) for view in range(first, first + members)}
    assert seen == set(range(members))


# golden values

GOLDEN_MIXES = {
    0: ("cutmix", 0.4446747448979592, (62, 8, 162, 172), [3, 2, 1, 0, 6, 5, 4, 7]),
    1: ("mixup", 0.2781524658203125, (0, 0, 0, 0), [0, 5, 4, 6, 2, 1, 3, 7]),
    2: ("cutmix", 0.6029974489795918, (58, 104, 166, 120), [6, 1, 3, 2, 5, 4, 0, 7]),
    3: ("mixup", 0.7905120849609375, (0, 0, 0, 0), [3, 2, 1, 0, 5, 4, 6, 7]),
    4: ("cutmix", 0.860969387755102, (115, 160, 109, 64), [1, 0, 3, 2, 6, 5, 4, 7]),
    5: ("cutmix", 0.8456632653061225, (93, 101, 88, 88), [3, 4, 5, 0, 1, 2, 6, 7]),
    6: ("cutmix", 0.8954878826530612, (0, 0, 69, 76), [2, 1, 0, 4, 3, 6, 5, 7]),
    7: ("cutmix", 0.7812898596938775, (0, 93, 93, 118), [4, 5, 3, 2, 0, 1, 6, 7]),
}  # fmt: skip
GOLDEN_PIXELS = {
    0: (127.4139, 0.0, 218.0, 20.0),
    1: (127.4979, 64.0, 176.409, 144.6284),
    2: (127.5263, 90.0, 142.0, 123.0),
    3: (127.4853, 164.2767, 105.7233, 139.225),
    4: (127.5222, 219.0, 155.0, 225.0),
    5: (127.5187, 1.0, 206.0, 21.0),
    6: (127.5116, 65.0, 2.0, 239.0),
    7: (127.4813, 117.0, 53.0, 124.0),
}  # fmt: skip


def test_mixes_are_the_recorded_ones():
    mixes = {view: draw_mix(Recipe(group_size=8), "train-000003.tar", 2, view, 7) for view in range(8)}
    check_recorded("GOLDEN_MIXES", {view: plain(mix) for view, mix in mixes.items()}, GOLDEN_MIXES)


def painted_batch(mixes: list[Mix], size: int) -> Batch:
    """Pictures of integers only, all different, mixed as said."""
    count, slots = len(mixes), len(mixes[0].partner)
    places = torch.arange(count * slots * 3 * size * size).reshape(count, slots, 3, size, size)
    edges = [(x, y, x + width, y + height) for x, y, width, height in (mix.box for mix in mixes)]
    return Batch(
        items=[Item(0, 2, view) for view in range(count)],
        members=[np.arange(slots)] * count,
        checks=[0] * count,
        images=(places * 2_654_435_761 % 2**32 >> 24).to(torch.uint8),
        labels=torch.zeros(count, slots, dtype=torch.int64),
        weights=torch.ones(count, slots),
        partner=torch.tensor(np.array([mix.partner for mix in mixes])),
        lam=torch.tensor([mix.lam for mix in mixes]),
        box=torch.tensor(edges),
    )


def test_mixed_pixels_are_the_recorded_ones():
    mixes = [draw_mix(Recipe(group_size=8, size=16), "train-000003.tar", 2, view, 7) for view in range(8)]
    pictures = mixed(painted_batch(mixes, 16)).unflatten(0, (8, 8)).double()
    weights = torch.linspace(1, 2, pictures[0].numel(), dtype=torch.float64).reshape(pictures[0].shape)
    found = {}
    for view, group in enumerate(pictures):
        mean = (group * weights).sum() / weights.sum()  # heeds where a pixel stands
        numbers = mean, group[0, 0, 8, 8], group[3, 1, 7, 12], group[5, 2, 2, 1]
        found[view] = tuple(round(float(number), 4) for number in numbers)
    check_recorded(
        "GOLDEN_PIXELS", found, GOLDEN_PIXELS, lambda now, then: then and now == pytest.approx(then, rel=1e-6)
    )


def test_groups_are_the_recorded_ones():
    groups = draw_groups(Recipe(group_size=4), "train-000003.tar", 1, 10)
    assert [group.tolist() for group in groups] == [[2, 5, 0, 8], [1, 3, 4], [6, 9, 7]]
