"""Calibration: bins, the expected calibration error, and the reliability diagram."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pipeline.config.schema import Student
from pipeline.models.tokens import LayerCosine
from pipeline.report.analysis import drawn_models
from pipeline.report.calibration import BINS, calibrate
from pipeline.report.comparison import Predictions, find_headline
from pipeline.report.entries import Entry
from pipeline.report.plots import DARK, LIGHT
from pipeline.report.reliability import plot_reliability, plot_token_cosines

property_settings = settings(derandomize=True, deadline=None, max_examples=60)
confidences = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(0, 1, width=32))


@property_settings
@given(confidences, st.data())
def test_bins_hold_every_image_once_and_the_error_is_the_one_computed_image_by_image(confidence, data):
    correct = data.draw(hnp.arrays(bool, len(confidence)))
    found = calibrate(confidence, correct)
    assert len(found.images) == BINS and found.images.sum() == len(confidence)
    error = 0.0
    for i in range(BINS):
        inside = [j for j, c in enumerate(confidence.tolist()) if i / BINS < c <= (i + 1) / BINS or (i == 0 and c == 0)]
        assert found.images[i] == len(inside)
        if inside:
            assert found.accuracy[i] == pytest.approx(correct[inside].mean())
            assert found.confidence[i] == pytest.approx(confidence[inside].astype(np.float64).mean())
            error += (
                len(inside)
                / len(confidence)
                * abs(correct[inside].mean() - confidence[inside].astype(np.float64).mean())
            )
    assert found.ece == pytest.approx(error, abs=1e-9) and 0 <= found.ece <= 1
    assert found.mean_accuracy == pytest.approx(correct.mean())
    assert found.mean_confidence == pytest.approx(confidence.astype(np.float64).mean(), abs=1e-9)


@property_settings
@given(st.floats(0, 1), st.integers(0, 40), st.integers(0, 40))
def test_constant_confidence_is_off_by_its_distance_from_the_accuracy(confidence, right, wrong):
    correct = np.arange(right + wrong + 1) < right
    assert calibrate(np.full(len(correct), confidence), correct).ece == pytest.approx(abs(confidence - correct.mean()))


@pytest.mark.parametrize("images", [500, 100_000])
def test_a_perfectly_calibrated_classifier_has_the_error_of_chance_which_vanishes_with_more_images(images):
    chance = np.random.default_rng(0)
    confidence = chance.beta(4, 1, images)
    found = [calibrate(confidence, chance.random(images) < confidence) for _ in range(30)]
    assert np.mean([each.ece for each in found]) == pytest.approx(found[0].chance, rel=0.1)
    assert found[0].chance < 1 / np.sqrt(images)


def test_a_classifier_that_is_always_sure_and_right_has_no_error():
    found = calibrate(np.ones(10, np.float32), np.ones(10, bool))
    assert found.ece == found.chance == 0 and found.images[-1] == 10


# pictures


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def test_reliability_has_a_panel_per_model_and_needs_no_colour(tmp_path):
    chance, shown = np.random.default_rng(0), {}
    for name in ("a $best$ student", "teacher"):
        confidence = chance.beta(4, 1, 200)
        shown[name] = calibrate(confidence, chance.random(200) < confidence)
    plot_reliability(tmp_path / "both.png", shown)
    plot_reliability(tmp_path / "dark.png", {"teacher": shown["teacher"]}, DARK)
    both, dark = (pixels(tmp_path / f"{name}.png") for name in ("both", "dark"))
    assert both.shape[1] == 2 * dark.shape[1]
    assert np.ptp(both, axis=2).max() < 20 and both.min() < 60
    assert np.median(both) > 250 and np.median(dark) < 40


def layers(depth: int) -> list[LayerCosine]:
    names = ["parameters", "input", *map(str, range(1, depth + 1)), "norm"]
    return [LayerCosine(name, 0.06 + 0.9 * number / len(names), 0.02) for number, name in enumerate(names)]


@pytest.mark.parametrize("depths", [(), (1,), (3, 12), (40,)])
def test_token_cosines_of_models_of_any_depth_are_drawn(tmp_path, depths):
    cosines = {f"model of {depth} $blocks$": layers(depth) for depth in depths}
    for theme in (LIGHT, DARK):
        plot_token_cosines(tmp_path / f"{theme.name}.png", cosines, theme)
    assert np.ptp(pixels(tmp_path / "light.png")) > 150 and np.median(pixels(tmp_path / "dark.png")) < 40


# which models


def entry(name: str, distillation: str | None) -> Entry:
    student = None if distillation is None else Student(model="deit_tiny_patch16_224", distillation=distillation)
    return Entry(name, "deit_tiny_patch16_224", Path(name), "", 224, 0.875, "float32", student=student)


@pytest.mark.parametrize(
    ("kinds", "correct", "drawn"),
    [
        ({"teacher": None, "none": "none", "hard": "hard", "soft": "soft"}, [9, 5, 7, 6], ["none", "hard", "teacher"]),
        ({"teacher": None, "none": "none", "hard": "hard"}, [9, 8, 7], ["none", "teacher"]),
        ({"teacher": None, "hard": "hard"}, [9, 8], ["hard", "teacher"]),
        ({"none": "none", "other": "none"}, [5, 7], ["none", "other"]),
    ],
)
def test_a_student_without_distillation_the_best_one_and_the_teacher_are_drawn(kinds, correct, drawn):
    entries, labels = [entry(name, kind) for name, kind in kinds.items()], np.zeros(10, np.int64)
    guesses = {
        name: {"class": Predictions(np.where(np.arange(10) < hits, 0, 1), np.ones(10, np.float32))}
        for name, hits in zip(kinds, correct, strict=True)
    }
    assert drawn_models(entries, find_headline(entries, guesses, labels)) == drawn
