"""The order of training: every group in turn, the same for any ranks, workers and processes."""

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.plan import Item, Plan, Unit, all_units, draw_cycle, training_plan, unit_items
from pipeline.config.schema import Recipe, Student
from pipeline.views.draw import group_count

property_settings = settings(derandomize=True, deadline=None, max_examples=60)


def recipe(repeats=2, block=4, **changes) -> Recipe:
    return Recipe(group_size=4, repeats=repeats, block=block, **changes)


def plan(samples=(9, 10, 10, 9), views=8, batch_groups=3, seed=0, open_shards=2, **changes) -> Plan:
    names = tuple(f"{i:06d}.tar" for i in range(len(samples)))
    return Plan(recipe(**changes), names, tuple(samples), views, batch_groups, seed, open_shards)


@st.composite
def plans(draw) -> Plan:
    repeats = draw(st.integers(1, 3))
    block = repeats * draw(st.integers(1, 3))
    return plan(
        samples=draw(st.lists(st.integers(0, 14), min_size=1, max_size=8).filter(any)),
        views=block * draw(st.integers(1, 3)),
        batch_groups=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 5)),
        open_shards=draw(st.integers(1, 9)),
        repeats=repeats,
        block=block,
    )


def every_group(a: Plan) -> set[tuple[int, int]]:
    return {(s, g) for s, samples in enumerate(a.samples) for g in range(group_count(samples, 4))}


def cycle(a: Plan, number: int) -> list[Item]:
    length = a.groups * a.recipe.repeats
    return [a.item(i) for i in range(number * length, (number + 1) * length)]


# the endless sequence


@property_settings
@given(plans(), st.integers(0, 4))
def test_each_cycle_visits_every_group_once(a, number):
    visits = [(item.shard, item.group) for item in cycle(a, number)[:: a.recipe.repeats]]
    assert set(visits) == every_group(a) and len(visits) == a.groups


@property_settings
@given(plans(), st.integers(0, 4))
def test_each_group_is_followed_by_its_repeats_in_successive_views(a, number):
    items, r = cycle(a, number), a.recipe.repeats
    for first in range(0, len(items), r):
        one = items[first]
        assert items[first : first + r] == [Item(one.shard, one.group, one.view + i) for i in range(r)]
        assert one.view % r == 0


@property_settings
@given(plans())
def test_views_go_up_cycle_by_cycle_and_come_round_again(a):
    r, cycles = a.recipe.repeats, a.views // a.recipe.repeats
    for number in range(2 * cycles + 1):
        first = r * (number % cycles)
        assert {item.view for item in cycle(a, number)} == set(range(first, first + r))


@property_settings
@given(plans())
def test_all_cycles_before_views_come_round_show_each_group_in_each_view_once(a):
    seen = Counter(item for number in range(a.views // a.recipe.repeats) for item in cycle(a, number))
    assert seen == Counter(Item(*group, view) for group in every_group(a) for view in range(a.views))


@property_settings
@given(plans())
def test_repeats_of_a_group_have_the_same_members(a):
    items, r = cycle(a, 0), a.recipe.repeats
    for first in range(0, len(items), r):
        assert len({a.members(item).tobytes() for item in items[first : first + r]}) == 1


@property_settings
@given(plans(), st.integers(0, 3))
def test_each_cycle_trains_every_sample_equally_often(a, number):
    seen = Counter((item.shard, row) for item in cycle(a, number) for row in a.members(item).tolist())
    rows = {(shard, row) for shard, samples in enumerate(a.samples) for row in range(samples)}
    assert seen == dict.fromkeys(rows, a.recipe.repeats)


@property_settings
@given(plans(), st.integers(0, 3))
def test_few_shards_are_open_at_a_time(a, number):
    left = Counter({shard: group_count(samples, 4) for shard, samples in enumerate(a.samples)})
    started = set()
    for item in cycle(a, number)[:: a.recipe.repeats]:
        started.add(item.shard)
        left[item.shard] -= 1
        assert len({shard for shard in started if left[shard]} | {item.shard}) <= a.open_shards


def test_groups_of_open_shards_are_interleaved():
    shards = [item.shard for item in cycle(plan((200, 200, 200, 200), open_shards=2), 0)[::2]]
    changes = sum(one != other for one, other in zip(shards[:100], shards[1:100], strict=False))
    assert changes > 30  # 50 expected of 99


def test_shards_are_visited_in_another_order_each_cycle():
    a = plan([4] * 30, open_shards=1)
    orders = {tuple(item.shard for item in cycle(a, number)[::2]) for number in range(10)}
    assert len(orders) == 10


# steps


@property_settings
@given(plans(), st.integers(0, 40))
def test_steps_cut_the_sequence_into_batches(a, step):
    first = step * a.batch_groups
    assert a.items(step) == [a.item(i) for i in range(first, first + a.batch_groups)]


@property_settings
@given(plans(), st.integers(0, 40), st.data())
def test_slices_of_a_step_together_are_the_step(a, step, data):
    count = data.draw(st.sampled_from([n for n in range(1, a.batch_groups + 1) if a.batch_groups % n == 0]))
    slices = [a.items(step, number, count) for number in range(count)]
    assert [item for one in slices for item in one] == a.items(step)
    assert {len(one) for one in slices} == {a.batch_groups // count}


@pytest.mark.parametrize("slices", [2, 4, 5])
def test_slices_that_do_not_divide_a_step_are_refused(slices):
    with pytest.raises(ValueError, match="divide"):
        plan(batch_groups=3).items(0, 0, slices)


@property_settings
@given(st.permutations(range(25)))
def test_items_of_a_step_do_not_depend_on_the_steps_asked_before(order):
    a = plan()
    found = {step: a.items(step) for step in order}
    assert found == {step: plan().items(step) for step in range(25)}


@property_settings
@given(plans(), st.integers(0, 40))
def test_weight_of_a_step_is_the_number_of_its_members(a, step):
    sizes = [len(members) for item in a.items(step) for members in [a.members(item)]]
    assert a.weight(step) == sum(sizes)
    assert all(1 <= size <= 4 for size in sizes)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"seed": 1}, False),
        ({"open_shards": 1}, False),
        ({"views": 4}, True),
        ({"mixup_alpha": 0.4}, True),
    ],
)
def test_order_depends_on_its_seed_and_open_shards_but_not_on_mixing(changes, same):
    one, other = (
        [(i.shard, i.group) for step in range(10) for i in a.items(step)] for a in (plan(), plan(**changes))
    )
    assert (one == other) is same


def test_recipes_of_different_seeds_order_differently():
    one = plan()
    other = dataclasses.replace(one, recipe=one.recipe.model_copy(update={"seed": 1}))
    assert cycle(one, 0) != cycle(other, 0)


def test_hundred_seeds_give_hundred_orders():
    assert len({draw_cycle(plan(seed=seed), 0).tobytes() for seed in range(100)}) == 100


def test_another_process_draws_the_same_order():
    a = plan()
    code = f"""
from pipeline.config.schema import Recipe
from pipeline.batches.plan import Plan
a = Plan(Recipe(group_size=4, repeats=2, block=4), {a.names}, {a.samples}, 8, 3, 0, 2)
print([(i.shard, i.group, i.view, a.members(i).tolist()) for step in range(30) for i in a.items(step)])
"""
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONHASHSEED": "1", "PATH": ""},
    ).stdout
    here = [(i.shard, i.group, i.view, a.members(i).tolist()) for step in range(30) for i in a.items(step)]
    assert output.strip() == str(here)


# epochs


@pytest.mark.parametrize(
    ("samples", "batch_groups", "steps"),
    [((8,), 1, 2), ((8,), 16, 1), ((4, 4, 4), 2, 2), ((9, 10, 10, 9), 5, 2)],
)
def test_epoch_is_a_pass_in_items_and_at_least_a_step(samples, batch_groups, steps):
    assert plan(samples, batch_groups=batch_groups).steps_per_epoch == steps


@property_settings
@given(plans(), st.integers(1, 5))
def test_views_seen_are_those_that_so_many_epochs_show(a, epochs):
    items = epochs * a.steps_per_epoch * a.batch_groups
    cycles = {i // (a.groups * a.recipe.repeats) for i in range(items)}
    assert a.views_seen(epochs) == len(cycles) * a.recipe.repeats


@property_settings
@given(plans(), st.integers(0, 60))
def test_epoch_of_a_step_counts_whole_epochs_before_it(a, step):
    assert a.epoch(step) * a.steps_per_epoch <= step < (a.epoch(step) + 1) * a.steps_per_epoch


def imagenet() -> Plan:
    """1,281,167 images in 1,024 shards, as the defaults cut them."""
    samples = [1251 + (i < 143) for i in range(1024)]
    assert sum(samples) == 1_281_167
    names = tuple(f"{i:06d}.tar" for i in range(1024))
    return Plan(Recipe(), names, tuple(samples), 300, Student().batch_size // 64)


def test_imagenet_takes_as_many_steps_an_epoch_as_deits():
    assert 1251 <= imagenet().steps_per_epoch <= 1290  # groups are a little less than full


def test_imagenet_wants_about_as_many_views_as_epochs():
    assert 300 <= imagenet().views_seen(300) <= 303


def test_plan_of_imagenet_holds_a_step_of_whole_groups():
    a = imagenet()
    items = a.items(1000)
    assert len(items) == 16 and 900 < a.weight(1000) <= 1024
    # copies of an image stand in a step three times or, at its ends, fewer
    assert max(Counter((i.shard, i.group) for i in items).values()) == 3


def test_plan_of_a_training_section_is_over_the_index(small_set):
    config, index = small_set
    student = Student(batch_size=8, seed=3, open_shards=2)
    a = training_plan(index, config.recipe, student, 8)
    assert (a.names, sum(a.samples)) == (("000000.tar", "000001.tar", "000002.tar"), 16)
    assert (a.batch_groups, a.seed, a.open_shards, a.views) == (2, 3, 2, 8)


# the teacher's work


@property_settings
@given(plans())
def test_units_cover_every_row_in_every_view_once(a):
    seen = Counter(
        (unit.shard, row, item.view)
        for unit in all_units(len(a.samples), a.views, a.recipe)
        for item in unit_items(unit, a.recipe, a.samples[unit.shard])
        for row in a.members(item).tolist()
    )
    rows = {(s, row, view) for s, n in enumerate(a.samples) for row in range(n) for view in range(a.views)}
    assert set(seen) == rows and set(seen.values()) == {1}


@property_settings
@given(plans())
def test_teacher_answers_exactly_the_items_that_training_visits(a):
    answered = Counter(
        item
        for unit in all_units(len(a.samples), a.views, a.recipe)
        for item in unit_items(unit, a.recipe, a.samples[unit.shard])
    )
    assert answered == Counter(i for number in range(a.views // a.recipe.repeats) for i in cycle(a, number))


def test_first_views_of_all_shards_are_computed_first():
    assert all_units(2, 8, recipe()) == [Unit(0, 0), Unit(1, 0), Unit(0, 1), Unit(1, 1)]


def test_views_of_a_group_follow_one_another_in_a_unit():
    items = unit_items(Unit(1, 1), recipe(), 6)
    assert items == [Item(1, group, view) for group in (0, 1) for view in (4, 5, 6, 7)]


def test_groups_of_another_block_are_other_groups():
    a = plan((40,), views=40)
    assert len({a.members(Item(0, 0, view)).tobytes() for view in range(40)}) == 10


def test_members_of_a_group_do_not_depend_on_other_shards():
    a, b = plan((9, 10)), plan((9, 10, 7, 8, 9))
    assert np.array_equal(a.members(Item(1, 0, 5)), b.members(Item(1, 0, 5)))
