"""report.html: one self-contained page, rendered with Jinja."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.common.files import write_text
from pipeline.models.tokens import LayerCosine
from pipeline.report.analysis import Analysis
from pipeline.report.classes import ClassResult, Confusion
from pipeline.report.comparison import describe_interval
from pipeline.report.grid import Section
from pipeline.report.pictures import data_uri, thumbnail
from pipeline.report.plots import DARK, LIGHT, Curve, plot_curves
from pipeline.report.reliability import plot_reliability, plot_token_cosines
from pipeline.report.settings import TrainingRow
from pipeline.report.tables import Result, by_model, result_columns

MATRIX_CLASSES = 20
"""Up to this number of classes, the confusion matrix is shown; beyond, the most confused pairs."""
CLASSES, PAIRS = 100, 30
"""Rows of the tables of classes and of confused pairs; the files next to the report have all of them."""


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    title: str
    results: list[Result]
    analysis: Analysis
    curves: dict[str, Curve]
    tokens: dict[str, list[LayerCosine]]
    """By model, for the models with two tokens."""
    views: Section
    training: list[TrainingRow]
    facts: dict[str, dict[str, str]]
    """Sections about the experiment, each with its terms and their descriptions."""
    loading: str
    """Python code."""


def write_report(path: Path, report: Report) -> None:
    """Write a page that opens anywhere, offline: pictures and styles are inside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    analysis = report.analysis
    wrong = [each for each in analysis.confusions if each.label != each.prediction]
    page = environment.get_template("report_template.html").render(
        report=report,
        analysis=analysis,
        headline=analysis.headline,
        columns=[(column, column.show_best(report.results)) for column in result_columns(report.results)],
        models=by_model(report.results),
        classes=analysis.classes[:CLASSES],
        matrix=confusion_matrix(analysis.classes, analysis.confusions),
        pairs=wrong[:PAIRS],
        pair_count=len(wrong),
        largest=max((share for row in analysis.disagreement.values() for share in row.values()), default=0) or 1,
        curves=_themed(plot_curves, report.curves),
        reliability=_themed(plot_reliability, analysis.reliability),
        token_cosines=_themed(plot_token_cosines, report.tokens),
        views=[[thumbnail(cell.picture, cell.caption) for cell in row] for row in report.views.rows],
        describe_interval=describe_interval,
    )
    write_text(path, page)


def _themed(plot: Callable, shown: Any) -> dict[str, str]:
    """A plot for light and for dark pages, as data URIs by the theme's name."""
    uris = {}
    for theme in (LIGHT, DARK):
        file = io.BytesIO()
        plot(file, shown, theme)
        uris[theme.name] = data_uri(file.getvalue(), "png")
    return uris


def confusion_matrix(
    classes: list[ClassResult], confusions: list[Confusion]
) -> dict[str, dict[str, tuple[int, float]]]:
    """Images and their share of the row, by label and prediction; empty for more than MATRIX_CLASSES classes."""
    names = sorted({each.label for each in confusions} | {each.prediction for each in confusions})
    if len(names) > MATRIX_CLASSES:
        return {}
    found = {(each.label, each.prediction): (each.images, each.share) for each in confusions}
    with_images = {each.name for each in classes}
    return {
        label: {prediction: found.get((label, prediction), (0, 0.0)) for prediction in names}
        for label in names
        if label in with_images
    }
