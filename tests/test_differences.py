"""Differences between rows of a study: paired by seed, against a reference."""

from math import isnan, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UsageError
from pipeline.config.study import Study
from pipeline.config.validation import validate
from pipeline.report.differences import Difference, difference_table, differences
from pipeline.report.study import Value


def value(views: str, seed: int, number: float, student: str = "token", metric: str = "top1") -> Value:
    return Value(f"v{views}/{student}-seed{seed}", {"student": student, "views": views}, seed, "run", metric, number)


def test_a_row_is_compared_with_the_reference_of_the_same_seed_and_other_levels():
    values = [value("1", 0, 0.5), value("1", 1, 0.6), value("30", 1, 0.9), value("30", 0, 0.7), value("30", 0, 0.1, "none")]
    assert differences(values, {"views": "30"}) == [
        Difference({"student": "token", "views": "1"}, "top1", (pytest.approx(-0.2), pytest.approx(-0.3)))  # type: ignore[arg-type]
    ]


def test_seeds_without_a_reference_and_other_metrics_are_left_out():
    values = [value("1", 0, 0.5), value("1", 1, 0.6), value("30", 1, 0.9), value("30", 0, 2.0, metric="loss")]
    (found,) = differences(values, {"views": "30"})
    assert found.values == (pytest.approx(-0.3),) and isnan(found.half_width) and found.show() == "-30.00 (1 seed)"


def test_the_table_names_what_is_compared_with():
    found = differences([value("1", 0, 0.5), value("30", 0, 0.75)], {"views": "30"})
    headings, rows = difference_table(found, {"views": "30"})
    assert headings == ["student", "views", "top1, points: difference from views 30 (95 % interval)"]
    assert rows == [["token", "1", "-25.00 (1 seed)"]]


def test_a_study_may_compare_with_several_references():
    references = [{"views": 30}, {"student": "none"}]
    study = validate(Study, {"base": "digits", "students": ["none"], "axes": {"views": {30: {}}}, "reference": references}, "test")
    assert study.reference == [{"views": "30"}, {"student": "none"}]
    with pytest.raises(UsageError, match="not views 10"):
        validate(Study, {"base": "digits", "axes": {"views": {30: {}}}, "reference": [{}, {"views": 10}]}, "test")


def test_the_interval_is_students():
    found = Difference({}, "top1", (-0.01, 0.0, 0.01))
    assert found.half_width == pytest.approx(4.302653 * 0.01 / sqrt(3), rel=1e-6)
    assert found.show() == "0.00 (-2.48 to 2.48, 3 seeds)"
    assert Difference({}, "loss", (0.5, 0.5)).show() == "0.5 (0.5 to 0.5, 2 seeds)"
    assert Difference({}, "evaluation.ece", (0.00125, 0.00125)).show() == "0.00125 (0.00125 to 0.00125, 2 seeds)"


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.floats(-0.5, 0.5))
def test_a_constant_difference_has_no_uncertainty(numbers: list[float], gap: float):
    values = [value("30", seed, number) for seed, number in enumerate(numbers)]
    values += [value("1", seed, number + gap) for seed, number in enumerate(numbers)]
    (found,) = differences(values, {"views": "30"})
    assert found.mean == pytest.approx(gap, abs=1e-12) and found.half_width == pytest.approx(0, abs=1e-12)
