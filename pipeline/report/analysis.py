"""Everything that the report derives from the predictions of the compared models."""

from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Config
from pipeline.models.evaluation import disagreement
from pipeline.report.calibration import Calibration, calibrate
from pipeline.report.classes import ClassResult, Confusion, class_results, confusions
from pipeline.report.comparison import (
    AllPredictions,
    Headline,
    compared_predictions,
    find_headline,
    joint_predictions,
    left_out,
)
from pipeline.report.entries import Entry
from pipeline.report.intervals import Estimate, accuracy_interval
from pipeline.report.model_details import student_details
from pipeline.report.pictures import Mistake, confident_mistakes
from pipeline.shards.index import Index


@dataclass(frozen=True)
class Analysis:
    headline: Headline
    intervals: dict[tuple[str, str], Estimate]
    """Confidence intervals of top-1, by model and classifier."""
    classes: list[ClassResult]
    """Worst class first, by the best student's accuracy."""
    confusions: list[Confusion]
    """The best student's."""
    mistakes: list[Mistake]
    """The best student's."""
    disagreement: dict[str, dict[str, float]]
    """The paper's Table 4."""
    left_out: list[str]
    """Classifiers that are not in that table."""
    calibration: dict[str, Calibration]
    """By model, for its joint classifier."""
    reliability: dict[str, Calibration]
    """Those that are drawn: of a student without distillation, the best student and the teacher."""
    details: dict[str, dict[str, Any]]
    """See `student_details`."""


def analyze(config: Config, entries: list[Entry], predictions: AllPredictions, val: Index) -> Analysis:
    """Compare predictions on the validation set with its labels and with one another."""
    labels, joint = val.labels(), joint_predictions(predictions)
    headline = find_headline(entries, predictions, labels)
    best, rows = headline.best, compared_predictions(config, predictions, labels)
    decided = {name: each.classes for name, each in joint.items()}
    calibration = {name: calibrate(each.confidence, each.classes == labels) for name, each in joint.items()}
    return Analysis(
        headline,
        {
            (model, classifier): accuracy_interval(each.classes == labels)
            for model, own in predictions.items()
            for classifier, each in own.items()
        },
        class_results(val.classes, labels, decided, best.name),
        confusions(val.classes, labels, decided[best.name]),
        confident_mistakes(val, labels, joint[best.name], best.size, best.crop),
        disagreement(rows),
        left_out(predictions, rows),
        calibration,
        {name: calibration[name] for name in drawn_models(entries, headline)},
        student_details(config, entries, predictions),
    )


def drawn_models(entries: list[Entry], headline: Headline) -> list[str]:
    """A student without distillation (the best student's counterpart, or else the first one), the best student, and
    the teacher; those that exist."""
    counterparts = [name for each in headline.comparisons if each.about for name in (each.first, each.second)]
    plain = [entry.name for entry in entries if entry.student and not entry.distilled]
    first = [name for name in counterparts if name in plain] or plain
    teacher = [entry.name for entry in entries if entry.student is None]
    return list(dict.fromkeys([*first[:1], headline.best.name, *teacher]))
