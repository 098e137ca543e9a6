"""What the compared models predict: the headline, and the rows of the paper's Table 4."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.config.paths import FINETUNED, TEACHER
from pipeline.config.schema import Config, result_fields
from pipeline.report.entries import Entry
from pipeline.report.intervals import Estimate, accuracy_interval, difference_interval

TRUTH = "truth"
DISTILLATION = ("model", "distillation", "alpha", "tau", "soft_reduction", "reuse_view")
"""Settings of a student that distillation may change: `model` by a distillation token alone, see `compared_settings`."""


@dataclass(frozen=True)
class Predictions:
    """What one classifier predicts for every validation image."""

    classes: np.ndarray
    """int64 (samples,)"""
    confidence: np.ndarray
    """Probability of that class, float32 (samples,)."""


AllPredictions = Mapping[str, Mapping[str, Predictions]]
"""By model and classifier."""


def joint_classifier(classifiers: Mapping[str, Predictions]) -> str:
    """The classifier that stands for a model: the mean of both heads, or else its only one, as in timm's forward pass."""
    return "mean" if "mean" in classifiers else "class"


def joint_predictions(predictions: AllPredictions) -> dict[str, Predictions]:
    """The predictions of every model's joint classifier."""
    return {name: own[joint_classifier(own)] for name, own in predictions.items()}


@dataclass(frozen=True)
class Comparison:
    """The difference in top-1 between two models."""

    first: str
    second: str
    about: str
    """How the second was trained in comparison; empty for the teacher."""
    difference: Estimate

    @property
    def points(self) -> str:
        """The difference in percentage points: `1.20 points higher than`, or `as accurate as`."""
        if not self.difference.value:
            return "as accurate as"
        shown = f"{abs(100 * self.difference.value):.2f}"
        return f"{'less than 0.01' if shown == '0.00' else shown} points {'lower' if self._lower else 'higher'} than"

    @property
    def interval(self) -> str:
        """The confidence interval of `points`."""
        d = self.difference
        note = "" if d.excludes_zero else "; no clear difference"
        return describe_interval(Estimate(-d.value, -d.high, -d.low) if self._lower else d) + note

    @property
    def _lower(self) -> bool:
        return self.difference.value < 0


@dataclass(frozen=True)
class Headline:
    """The best student, and how it compares with a student without distillation and with the teacher."""

    best: Entry
    tied: list[str]
    """Other students that classify as many images correctly."""
    classifier: str
    top1: Estimate
    images: int
    comparisons: list[Comparison]
    missing: str
    """Why there is no comparison with a student without distillation, or empty."""
    guess: float
    """The accuracy of always predicting the most frequent class."""

    def lines(self) -> list[str]:
        """The headline as plain text."""
        tied = f" (as good: {', '.join(self.tied)})" if self.tied else ""
        top1, interval = f"{100 * self.top1.value:.2f} %", describe_interval(self.top1)
        lines = [f"best student: {self.best.name}{tied}, top-1 {top1} ({interval}) on {self.images:,} images"]
        for each in self.comparisons:
            than = f"the student `{each.second}`, {each.about}" if each.about else f"the {each.second}"
            lines.append(f"  {each.first}: {each.points} {than} ({each.interval})")
        if self.missing:
            lines.append(f"  {self.missing}")
        return [*lines, f"  always predicting the most frequent class: {100 * self.guess:.2f} %"]


def describe_interval(share: Estimate) -> str:
    """A confidence interval in percent or percentage points."""
    return f"95 % interval {100 * share.low:.2f} to {100 * share.high:.2f}"


def find_headline(entries: list[Entry], predictions: AllPredictions, labels: np.ndarray) -> Headline:
    """Compare the best student, by the top-1 of its joint classifier, with its counterpart and the teacher."""
    correct = {name: own.classes == labels for name, own in joint_predictions(predictions).items()}
    ranked = sorted((e for e in entries if e.name != TEACHER), key=lambda e: correct[e.name].sum(), reverse=True)
    best = ranked[0]
    tied = [e.name for e in ranked[1:] if correct[e.name].sum() == correct[best.name].sum()]
    pair = _distillation_pair(best, ranked)
    pairs = [(*pair, _about(*pair))] if pair else []
    pairs += [(best, entry, "") for entry in entries if entry.name == TEACHER]
    comparisons = [
        Comparison(first.name, second.name, about, difference_interval(correct[first.name], correct[second.name]))
        for first, second, about in pairs
    ]
    other = "without" if best.distilled else "with"
    missing = "" if pair else f"no student {other} distillation has the same architecture, initial weights, size and epochs"
    classifier, top1 = joint_classifier(predictions[best.name]), accuracy_interval(correct[best.name])
    guess = np.bincount(labels).max() / len(labels)
    return Headline(best, tied, classifier, top1, len(labels), comparisons, missing, float(guess))


def _about(first: Entry, second: Entry) -> str:
    """Says of the second that it was trained with or without distillation, and in which other settings it differs."""
    others = other_differences(first, second)
    also = f" and with other settings too ({', '.join(others)})" if others else ""
    return f"trained {'with' if second.distilled else 'without'} distillation{also}"


def _distillation_pair(best: Entry, ranked: list[Entry]) -> tuple[Entry, Entry] | None:
    """The best student and, of those that share `compared_settings` but for distillation, the best with the fewest other
    differences; or such a pair for the student that was fine-tuned into it."""
    source = best.name.removesuffix(f"-{FINETUNED}")
    for first in [best, *(entry for entry in ranked if entry.name == source and entry is not best)]:
        others = [each for each in ranked if each.distilled != first.distilled]
        others = [each for each in others if compared_settings(each) == compared_settings(first)]
        if others:
            return first, min(others, key=lambda other: len(other_differences(first, other)))
    return None


def compared_settings(entry: Entry) -> tuple[object, ...]:
    """What two students must share to be compared; a distillation token is part of distillation."""
    assert entry.student
    model, fine_tuned = entry.student.model.replace("_distilled", ""), entry.name.endswith(FINETUNED)
    return model, entry.student.kwargs, entry.student.weights, entry.student.epochs, entry.size, fine_tuned


def other_differences(first: Entry, second: Entry) -> list[str]:
    """The settings, besides those of distillation and of `compared_settings`, in which two students differ."""
    assert first.student and second.student
    one, two = result_fields(first.student), result_fields(second.student)
    return [key for key in one if key not in DISTILLATION and one[key] != two[key]]


def compared_predictions(config: Config, predictions: AllPredictions, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Select the rows of the paper's Table 4.

    These are the labels, the teacher, a student trained without distillation, both heads and their mean for the student that
    is fine-tuned or else for the first distilled one, and the joint classifier of each fine-tuned student.
    """
    selected = {TRUTH: labels}
    if TEACHER in predictions:
        selected[TEACHER] = predictions[TEACHER]["class"].classes
    distilled = [name for name in config.students if config.student_named(name).distillation != "none"]
    plain = [name for name in config.students if name not in distilled]
    source = [*config.finetune.students, *distilled, *plain, ""][0]
    if plain and plain[0] != source:
        selected[f"{plain[0]} class"] = predictions[plain[0]]["class"].classes
    for name in ("class", "distillation", "mean"):
        if name in predictions.get(source, {}):
            selected[f"{source} {name}"] = predictions[source][name].classes
    for name in (name for name in predictions if name.endswith(FINETUNED)):
        joint = joint_classifier(predictions[name])
        selected[f"{name} {joint}"] = predictions[name][joint].classes
    return selected


def left_out(predictions: AllPredictions, selected: Mapping[str, object]) -> list[str]:
    """The classifiers that `compared_predictions` did not select."""
    names = [f"{model} {classifier}" for model, own in predictions.items() if model != TEACHER for classifier in own]
    return [name for name in names if name not in selected]
