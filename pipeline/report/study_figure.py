"""The figure of a study: its first metric against an axis, against another metric, or as a dot per row of the table."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

from pipeline.config.study import FINETUNED_COLUMN, is_number
from pipeline.config.study import Figure as Settings
from pipeline.report.grid import save_figure
from pipeline.report.plots import DPI, LIGHT, LINE_STYLES, MARKERS, plain_text
from pipeline.report.study import Summary, heading, is_share, varying_axes


@dataclass(frozen=True)
class Point:
    """Where a mean is drawn, with the standard deviations; accuracies in percent."""

    x: float
    x_deviation: float
    y: float
    y_deviation: float
    text: str = ""
    """Label drawn next to the point."""


def draw_figure(path: Path, summaries: Sequence[Summary], metric: str, settings: Settings | None) -> None:
    """Write the figure of a metric as PNG; without settings, or without values for its horizontal axis, a dot per row.

    Rows without a level of the horizontal axis, as students before fine-tuning may be, are left out of it.
    """
    shown = [each for each in summaries if each.metric == metric]
    placed = [each for each in shown if settings and each.levels.get(settings.x)]
    if settings and placed and all(is_number(each.levels[settings.x]) for each in placed):
        draw_lines(path, placed, settings.x, settings.log)
    elif settings and settings.x != metric and any(each.metric == settings.x for each in summaries):
        draw_against_metric(path, shown, [each for each in summaries if each.metric == settings.x], settings)
    else:
        draw_dots(path, shown)


def draw_lines(path: Path, summaries: Sequence[Summary], x: str, log: bool) -> None:
    """Plot one metric against an axis: means with standard deviations, a line per combination of the other axes.

    A line is interrupted where it has no result and another line has one.
    """
    others = [axis for axis in varying_axes(summaries) if axis != x]
    lines: dict[str, list[Point]] = {}
    for each in summaries:
        lines.setdefault(_label(others, each), []).append(Point(float(each.levels[x]), 0.0, *_scaled(each)))
    places = {point.x for points in lines.values() for point in points}
    for points in lines.values():
        points += [Point(place, 0.0, math.nan, math.nan) for place in places - {point.x for point in points}]
    figure, axes = _plot(lines, log)
    axes.xaxis.set_major_locator(FixedLocator(sorted(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plain_text(x, None), color=LIGHT.muted)
    _finish(axes, summaries, "y")
    save_figure(figure, path)


def draw_against_metric(path: Path, summaries: Sequence[Summary], others: Sequence[Summary], settings: Settings) -> None:
    """Plot one metric against another, `others`: a line along one axis per combination of the remaining ones."""
    places = {tuple(each.levels.items()): _scaled(each) for each in others}
    remaining = [axis for axis in varying_axes(summaries) if axis != settings.along]
    lines: dict[str, list[Point]] = {}
    for each in summaries:
        if (place := places.get(tuple(each.levels.items()))) is not None:
            text = plain_text(each.levels.get(settings.along, ""), None) if settings.along else ""
            lines.setdefault(_label(remaining, each), []).append(Point(*place, *_scaled(each), text))
    figure, axes = _plot(lines, settings.log)
    if settings.log:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plain_text(heading(settings.x), None), color=LIGHT.muted)
    _finish(axes, summaries, "y")
    save_figure(figure, path)


def draw_dots(path: Path, summaries: Sequence[Summary]) -> None:
    """Plot one metric: a dot with its standard deviation for each combination of levels, one below the other."""
    varying = varying_axes(summaries)
    labels = [_label(varying, each) for each in summaries]
    figure = Figure((6.4, 1.0 + 0.3 * len(labels)), dpi=DPI, layout="constrained", facecolor=LIGHT.page)
    axes = figure.subplots()
    means, deviations = zip(*map(_scaled, summaries), strict=True)
    axes.errorbar(means, range(len(labels)), xerr=deviations, color="#000000", marker="o", ls="", ms=5, capsize=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first at the top
    _finish(axes, summaries, "x")
    save_figure(figure, path)


def _plot(lines: dict[str, list[Point]], log: bool) -> tuple[Figure, Axes]:
    """Plot lines that can be told apart without colours."""
    figure = Figure((6.4, 4.2), dpi=DPI, layout="constrained", facecolor=LIGHT.page)
    axes = figure.subplots()
    styles = zip(itertools.cycle(LIGHT.curves), itertools.cycle(MARKERS), itertools.cycle(LINE_STYLES))
    for (label, found), (colour, marker, style) in zip(lines.items(), styles, strict=False):
        points = sorted(found, key=lambda point: point.x)
        x, x_deviations = [point.x for point in points], [point.x_deviation for point in points]
        y, y_deviations = [point.y for point in points], [point.y_deviation for point in points]
        axes.errorbar(x, y, y_deviations, x_deviations if any(x_deviations) else None, label=label, color=colour,
                      marker=marker, ls=style, ms=5, lw=1.5, capsize=3)  # fmt: skip
        for point in (point for point in points if point.text):
            axes.annotate(point.text, (point.x, point.y), (5, 5), textcoords="offset points", color=LIGHT.muted, size=8)
    if log:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    if any(lines):
        axes.legend(frameon=False, handlelength=3.5, labelcolor=LIGHT.ink)
    return figure, axes


def _label(names: Sequence[str], each: Summary) -> str:
    """Levels as they stand in a legend: numbers, yes and no with their axis."""
    levels = [(axis, level) for axis in names if (level := each.levels.get(axis))]
    named = [f"{axis} {level}" if is_number(level) or axis == FINETUNED_COLUMN else level for axis, level in levels]
    return plain_text(", ".join(named), None)


def _scaled(each: Summary) -> tuple[float, float]:
    """Mean and standard deviation, 0 for a single seed; accuracies in percent."""
    scale = 100 if is_share(each.metric) else 1
    return scale * each.mean, 0.0 if math.isnan(each.deviation) else scale * each.deviation


def _finish(axes: Axes, summaries: Sequence[Summary], value_axis: str) -> None:
    """Name the axis of values, and say what the bars are."""
    counts = sorted({len(each.values) for each in summaries})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    bars = "one seed" if counts == [1] else f"mean ± standard deviation of {seeds} seeds"
    text = f"{plain_text(heading(summaries[0].metric), None)} ({bars})"
    (axes.set_ylabel if value_axis == "y" else axes.set_xlabel)(text, color=LIGHT.muted)
    axes.grid(axis="both", color=LIGHT.line, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=LIGHT.muted, length=0)
