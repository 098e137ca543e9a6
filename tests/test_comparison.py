"""Comparisons of models: confidence intervals, the headline, classes and what they are confused with."""

import base64
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.schema import Student
from pipeline.report import model_details
from pipeline.report.classes import class_results, confusions
from pipeline.report.comparison import Comparison, Predictions, find_headline
from pipeline.report.entries import Entry
from pipeline.report.intervals import Estimate, accuracy_interval, difference_interval
from pipeline.report.pictures import LOSSLESS, THUMBNAIL, thumbnail

property_settings = settings(derandomize=True, deadline=None, max_examples=40)

ENTRY = Entry("hard", "deit_tiny", Path("hard"), "", 224, 0.875, "float32")


def predictions(*classes: int) -> Predictions:
    return Predictions(np.array(classes), np.full(len(classes), 0.5, np.float32))


def test_wilson_interval_is_that_of_the_literature():
    found = accuracy_interval(np.repeat([True, False], [81, 182]))  # Newcombe 1998, table I
    assert (found.value, found.low, found.high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    none, every = (accuracy_interval(np.full(10, value)) for value in (False, True))
    assert none.low == 0 and every.high == 1 and every.low == pytest.approx(1 - none.high) and 0 < none.high < 0.3


@property_settings
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_interval_of_a_difference_contains_it_and_turns_with_its_sign(pairs):
    first, second = np.array(pairs).T
    one, other = difference_interval(first, second), difference_interval(second, first)
    assert -1 <= one.low <= one.high <= 1
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.low <= one.value <= one.high and one.value == pytest.approx(first.mean() - second.mean())


def test_interval_of_a_difference_covers_the_true_one_nearly_as_often_as_it_says():
    noise, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        easy = noise.random(150) < 0.7
        first, second = easy | (noise.random(150) < 0.5), easy | (noise.random(150) < 0.2)
        found = difference_interval(first, second)
        covered += found.low <= 0.09 <= found.high  # 0.3 (0.5 - 0.2)
    assert 930 <= covered <= 975


def compared(accuracy: dict[str, int], settings: dict[str, dict] | None = None):
    """The headline of models that classify so many of 100 images correctly."""
    entries, labels = [], np.zeros(100, np.int64)
    for name in accuracy:
        own = {"distillation": "none" if "none" in name else "hard"} | (settings or {}).get(name, {})
        student = None if name == "teacher" else Student(**own)
        entries.append(dataclasses.replace(ENTRY, name=name, student=student))
    decided = {name: {"class": predictions(*[0] * n, *[1] * (100 - n))} for name, n in accuracy.items()}
    return find_headline(entries, decided, labels)


def test_headline_compares_the_best_student_with_its_counterpart_and_the_teacher():
    found = compared({"teacher": 95, "none": 70, "hard": 80, "soft": 75})
    assert (found.best.name, found.tied, found.top1.value, found.missing) == ("hard", [], 0.8, "")
    assert [(c.first, c.second, round(c.difference.value, 9)) for c in found.comparisons] == [
        ("hard", "none", 0.1), ("hard", "teacher", -0.15),
    ]  # fmt: skip
    lines = found.lines()
    assert lines[0] == "best student: hard, top-1 80.00 % (95 % interval 71.12 to 86.66) on 100 images"
    assert lines[1].startswith("  hard: 10.00 points higher than the student `none`, trained without distillation (95 % interval 3.")
    assert lines[2].startswith("  hard: 15.00 points lower than the teacher (95 % interval ") and "clear" not in lines[2]


def test_headline_says_where_distillation_did_not_help_and_where_nothing_is_clear():
    lines = compared({"none": 81, "hard": 80}).lines()
    assert lines[0].startswith("best student: none")
    assert lines[1].startswith("  none: 1.00 points higher than the student `hard`, trained with distillation (95 % interval -")
    assert lines[1].endswith("; no clear difference)") and lines[2:] == ["  always predicting the most frequent class: 100.00 %"]


@pytest.mark.parametrize(("difference", "text"), [
    (0.012, "1.20 points higher than"), (-0.012, "1.20 points lower than"), (0.0, "as accurate as"),
    (0.00002, "less than 0.01 points higher than"),
])  # fmt: skip
def test_a_difference_is_told_without_rounding_it_to_nothing(difference, text):
    assert Comparison("a", "b", "", Estimate(difference, -0.1, 0.1)).points == text


def test_headline_names_students_that_are_as_good():
    assert compared({"none": 60, "soft": 80, "hard": 80}).lines()[0].startswith("best student: soft (as good: hard), ")


@pytest.mark.parametrize(
    "other", [{"model": "deit_small_patch16_224"}, {"epochs": 7}, {"kwargs": {"depth": 1}}, {"weights": "own.pth"}]
)
def test_headline_compares_no_student_of_another_architecture_or_length_of_training(other):
    found = compared({"teacher": 95, "none": 70, "hard": 80}, {"none": other})
    assert [c.second for c in found.comparisons] == ["teacher"]
    assert found.lines()[-2] == "  no student without distillation has the same architecture, initial weights, size and epochs"


def test_headline_prefers_the_counterpart_that_differs_least_and_names_what_else_differs():
    others = {"none-fast": {"lr": 1e-3, "seed": 1}, "none": {"seed": 1}}
    found = compared({"none-fast": 75, "none": 70, "hard": 80}, others).comparisons[0]
    assert (found.second, found.about) == ("none", "trained without distillation and with other settings too (seed)")


def test_distillation_token_is_no_other_architecture():
    plain, token = ({"model": f"deit_tiny_{name}patch16_224"} for name in ("", "distilled_"))
    found = compared({"none": 70, "token": 80}, {"none": plain, "token": token})
    assert [c.second for c in found.comparisons] == ["none"] and not found.missing


def test_fine_tuned_student_without_counterpart_has_that_of_the_student_it_was_tuned_from():
    found = compared({"teacher": 85, "none": 70, "hard": 80, "hard-finetuned": 90})
    assert found.best.name == "hard-finetuned"
    assert [(c.first, c.second) for c in found.comparisons] == [("hard", "none"), ("hard-finetuned", "teacher")]


def test_classes_are_listed_worst_first_and_without_those_that_have_no_image():
    labels, best, other = np.array([0, 0, 1, 1, 3]), np.array([0, 0, 0, 1, 3]), np.array([1, 1, 1, 1, 1])
    found = class_results(["a", "b", "empty", "d"], labels, {"best": best, "other": other}, "best")
    assert [(row.name, row.images, row.top1) for row in found] == [
        ("b", 2, {"best": 0.5, "other": 1}), ("a", 2, {"best": 1, "other": 0}), ("d", 1, {"best": 1, "other": 0}),
    ]  # fmt: skip


def test_confusions_count_every_image_once():
    labels, predicted = np.array([0, 0, 0, 2, 2, 1]), np.array([2, 2, 0, 2, 1, 1])
    found = {(row.label, row.prediction): (row.images, row.share) for row in confusions(["a", "b", "c"], labels, predicted)}
    assert found == {
        ("a", "c"): (2, 2 / 3), ("a", "a"): (1, 1 / 3), ("b", "b"): (1, 1), ("c", "c"): (1, 0.5), ("c", "b"): (1, 0.5),
    }  # fmt: skip
    assert next(iter(found)) == ("a", "c")


@pytest.mark.parametrize("side", [LOSSLESS, LOSSLESS + 1, THUMBNAIL + 100])
def test_thumbnails_are_small_and_small_pictures_keep_every_pixel(side):
    picture = np.random.default_rng(0).integers(0, 256, (side, side // 2, 3), np.uint8)
    shown = thumbnail(picture, "caption")
    with Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2]))) as image:
        assert image.height == min(side, THUMBNAIL) and shown.small == (side <= LOSSLESS)
        if shown.small:
            assert (np.array(image) == picture).all()


def test_a_student_is_set_against_one_without_distillation_of_all_its_other_settings():
    token = Student(distillation="hard", model="deit_tiny_distilled_patch16_224", seed=1, lr=0.01, tau=9.0)
    plain = token.model_copy(update={"distillation": "none", "model": "deit_tiny_patch16_224", "tau": 3.0})
    students = {"token": token, "lr": plain.model_copy(update={"lr": 0.1}), "seed": plain.model_copy(update={"seed": 0}), "same": plain}
    entries = {name: dataclasses.replace(ENTRY, name=name, student=student) for name, student in students.items()}
    predicted = {name: {"class": predictions(label)} for name, label in {"token": 0, "lr": 1, "seed": 1, "same": 0}.items()}
    found = model_details.disagreements(list(entries.values()), predicted)
    assert found["token"] == {"class": {"undistilled": 0.0}}
    del entries["same"]
    assert model_details.disagreements(list(entries.values()), predicted)["token"] == {"class": {}}
