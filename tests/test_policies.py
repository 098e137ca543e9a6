"""Policies: timm's strings, AutoAugment tables and arguments; ops drawn as timm and torchvision draw them."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats
from test_recipe import DRAWS, LIKELY, same_distribution, same_frequencies, seeded

from pipeline.config.policies import (
    FACTOR,
    INCREASING_OPS,
    ORIGINAL,
    AutoAugment,
    RandAugment,
    op_argument,
    parse_policy,
)
from pipeline.config.schema import Recipe
from pipeline.views.draw import draw_view

OF_POLICIES = {name for pair in ORIGINAL for name, _, _ in pair}
JITTERED = {"Brightness", "Contrast", "Color"}


def test_ops_are_timms_increasing_set_in_its_order():
    from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS  # seconds to import

    assert list(INCREASING_OPS) == _RAND_INCREASING_TRANSFORMS


def test_auto_augment_policy_is_timms():
    from timm.data.auto_augment import auto_augment_policy

    theirs = [[(op.name, op.prob, op.magnitude) for op in pair] for pair in auto_augment_policy("original")]
    assert [list(pair) for pair in ORIGINAL] == theirs


@pytest.mark.parametrize("text", ["original-mstd0.5", "original", "original-mstd0", "original-mstd101"])
def test_auto_augment_string_is_read_as_timm_reads_it(text):
    from timm.data.auto_augment import auto_augment_transform

    ours, theirs = parse_policy(text), auto_augment_transform(text)
    assert {ours.std} == {op.magnitude_std for pair in theirs.policy for op in pair}
    assert ours.policy == ORIGINAL


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-inc1",
        "rand-inc1-p0.3-n3-m7",
        "rand-m9-mstd100-inc1",
        "rand-m9-mstd101-inc1",
        "rand-m15-mmax20-mstd1-inc1",
        "rand-m0-n1-p1-mstd0-inc1",
    ],
)
def test_rand_augment_string_is_read_as_timm_reads_it(text):
    from timm.data.auto_augment import rand_augment_transform

    ours, theirs = parse_policy(text), rand_augment_transform(text)
    by_timm = {
        (op.magnitude, op.magnitude_std, op.prob, theirs.num_layers, op.magnitude_max or 10)
        for op in theirs.ops
    }
    assert by_timm == {(ours.magnitude, ours.std, ours.prob, ours.layers, ours.magnitude_max)}


@pytest.mark.parametrize(("text", "kind"), [("rand-m9-inc1", RandAugment), ("original-mstd0.5", AutoAugment)])
def test_first_word_of_a_string_decides_the_kind_of_policy(text, kind):
    assert isinstance(parse_policy(text), kind)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "3a",
        "v0",
        "originalr",
        "augmix-m3",
        "Original",
        "original-m9",
        "original-mstd",
        "original-mstd0.5x",
        "original-",
        "original-inc1",
        "rand",
        "rand-",
        "rand-m9-mstd0.5",
        "rand-m9-inc0",
        "rand-m9-x3-inc1",
        "rand-mfoo-inc1",
        "rand-m-9-inc1",
        "rand-m9.5-inc1",
        "rand-m9-t3a-inc1",
        " rand-m9-inc1",
    ],
)
def test_string_that_is_not_understood_is_refused_with_it(text):
    with pytest.raises(ValueError) as caught:
        parse_policy(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("name", sorted(OF_POLICIES | JITTERED | {*INCREASING_OPS}))
def test_argument_of_an_op_is_timms(name, negate, monkeypatch):
    from timm.data import auto_augment

    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: -value if negate else value)
    level_to_arg = auto_augment.LEVEL_TO_ARG[name] or (lambda magnitude, hparams: (None,))
    for magnitude in np.linspace(0, 20, 401).tolist():
        # enhancement factors are rounded to what blending takes exactly
        assert op_argument(name, magnitude, negate) == pytest.approx(level_to_arg(magnitude, {})[0], abs=0.51 / FACTOR)


# distributions of what is drawn


@pytest.fixture(scope="module")
def views() -> list[tuple]:
    """The ops of many views of the default recipe."""
    return [draw_view(Recipe(), f"n{i:08d}", i % 7, 9, 9).ops for i in range(DRAWS)]


def timm_ops(text: str) -> list[tuple]:
    """(name, argument) of the ops that timm fires for each of many pictures."""
    from timm.data import auto_augment

    if text.startswith("rand"):
        transform = auto_augment.rand_augment_transform(text)
        several = transform.ops
    else:
        transform = auto_augment.auto_augment_transform(text)
        several = [op for pair in transform.policy for op in pair]
    for op in several:
        # the picture is what has been applied to it
        op.aug_fn = lambda fired, argument=None, name=op.name, **_: (*fired, (name, argument))
    with seeded():
        return [transform(()) for _ in range(DRAWS)]


POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m5-mstd101-n1-p0.7-inc1", "original-mstd0.5", "original-mstd2")


@pytest.fixture(scope="module", params=POLICIES)
def fired(request) -> tuple[list[tuple], list[tuple]]:
    """The ops of many views, ours and timm's."""
    recipe = Recipe(auto_augment=request.param)
    return [draw_view(recipe, "ops", view, 9, 9).ops for view in range(DRAWS)], timm_ops(request.param)


def test_ops_and_their_order_are_distributed_as_timms(fired):
    ours, theirs = (Counter(" ".join(name for name, _ in ops) for ops in views) for views in fired)
    assert same_frequencies(ours, theirs)


def test_arguments_of_ops_are_distributed_as_timms(fired):
    ours, theirs = ({}, {})
    for arguments, views in zip((ours, theirs), fired, strict=True):
        for ops in views:
            for name, argument in ops:
                # rounded as ours are, for magnitudes that are cut to 0 and 10 must stay ties
                value = 0 if argument is None else round(round(argument * FACTOR) / FACTOR, 4)
                arguments.setdefault(name, []).append(value)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_distribution(ours[name], theirs[name])] == []


def test_ops_are_chosen_uniformly(views):
    counts = Counter(name for ops in views for name, _ in ops)
    assert stats.chisquare([counts[name] for name in INCREASING_OPS]).pvalue > LIKELY


def test_no_two_or_one_op_fires_as_two_coins_fall(views):
    counts = Counter(len(ops) for ops in views)
    expected = [DRAWS / 4, DRAWS / 2, DRAWS / 4]
    assert stats.chisquare([counts[n] for n in range(3)], expected).pvalue > LIKELY


@pytest.fixture(
    scope="module",
    params=[
        "rand-m9-mstd0.5-p1-inc1",
        "rand-m4-mstd3-p1-inc1",
        "rand-m7-mstd101-p1-inc1",
        "rand-m12-mmax15-mstd2-p1-inc1",
    ],
)
def magnitudes(request) -> tuple[np.ndarray, np.ndarray]:
    """Ours, from the arguments of geometric ops, and timm's; rounded, as both have ties at the ends."""
    from timm.data.auto_augment import rand_augment_transform

    theirs = []
    operation = rand_augment_transform(request.param).ops[0]
    operation.level_fn = lambda magnitude, hparams: theirs.append(magnitude) or ()
    operation.aug_fn = lambda image, **_: image
    with seeded():
        for _ in range(DRAWS):
            operation(None)
    recipe = Recipe(auto_augment=request.param)
    unit = {name: op_argument(name, 1, False) for name in INCREASING_OPS[-4:]}
    ops = [op for view in range(2 * DRAWS) for op in draw_view(recipe, "key", view, 9, 9).ops]
    ours = [abs(argument) / unit[name] for name, argument in ops if name in unit]
    return np.round(ours, 4), np.round(theirs, 4)


def test_magnitudes_are_distributed_as_timms(magnitudes):
    assert same_distribution(*magnitudes)


def test_magnitudes_are_spread_as_timms(magnitudes):
    ours, theirs = (drawn.std() for drawn in magnitudes)
    assert ours == pytest.approx(theirs, rel=0.025)  # three standard errors


def test_signs_are_fair(views):
    signs = [argument > 0 for ops in views for name, argument in ops if name in ("Rotate", "ShearX")]
    assert stats.binomtest(sum(signs), len(signs), 0.5).pvalue > LIKELY


# distributions of colour jitter


@pytest.fixture(scope="module")
def jittered() -> tuple[list[tuple], list[tuple]]:
    """(name, factor) of colour jitter's three ops in their order, ours and torchvision's."""
    from torchvision.transforms import ColorJitter

    names, theirs = ("Brightness", "Contrast", "Color"), []
    torchvisions = ColorJitter(0.3, 0.3, 0.3)
    with seeded():
        for _ in range(DRAWS):
            order, *factors = torchvisions.get_params(
                torchvisions.brightness, torchvisions.contrast, torchvisions.saturation, torchvisions.hue
            )
            theirs.append(tuple((names[i], factors[i]) for i in order.tolist() if i < 3))
    return [draw_view(Recipe(auto_augment=None), "key", view, 9, 9).ops for view in range(DRAWS)], theirs


def test_order_of_colour_jitter_is_distributed_as_torchvisions(jittered):
    ours, theirs = (Counter(" ".join(name for name, _ in ops) for ops in views) for views in jittered)
    assert len(ours) == 6 and same_frequencies(ours, theirs)


@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color"])
def test_factors_of_colour_jitter_are_distributed_as_torchvisions(name, jittered):
    assert same_distribution(*([dict(ops)[name] for ops in views] for views in jittered))


@pytest.mark.parametrize("place", range(3))
def test_factors_of_colour_jitter_do_not_depend_on_the_order(place, jittered):
    assert same_distribution(*([ops[place][1] for ops in views] for views in jittered))


def test_factors_of_colour_jitter_are_not_correlated(jittered):
    names = ("Brightness", "Contrast", "Color")
    factors = np.array([[dict(ops)[name] for name in names] for ops in jittered[0]])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert stats.pearsonr(factors[:, i], factors[:, j]).pvalue > LIKELY


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_factors_of_colour_jitter_span_their_strength(strength):
    recipe = Recipe(auto_augment=None, color_jitter=strength)
    factors = [factor for view in range(2000) for _, factor in draw_view(recipe, "key", view, 9, 9).ops]
    assert min(factors) == pytest.approx(1 - strength, abs=0.01)
    assert max(factors) == pytest.approx(1 + strength, abs=0.01)
