"""Plots of what accuracy alone does not show: calibration, and the two tokens of a distilled DeiT."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from pipeline.models.tokens import INPUT, NORM, PARAMETERS, LayerCosine
from pipeline.report.calibration import Calibration
from pipeline.report.grid import save_figure
from pipeline.report.intervals import accuracy_interval
from pipeline.report.plots import DPI, LIGHT, LINE_STYLES, MARKERS, Theme, plain_text, style_axes


def plot_reliability(path: Path | BinaryIO, calibrations: dict[str, Calibration], theme: Theme = LIGHT) -> None:
    """Plot, for each classifier, accuracy against confidence above the number of images per bin; empty bins are left out."""
    figure = Figure((3.4 * len(calibrations), 4.6), dpi=DPI, layout="constrained", facecolor=theme.page)
    grid = figure.subplots(2, len(calibrations), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for upper, lower, (name, each) in zip(grid[0], grid[1], calibrations.items(), strict=True):
        _draw_reliability(upper, each, theme)
        style_axes(upper, f"{plain_text(name, 20)}: ECE {100 * each.ece:.1f} %", theme)
        _draw_images(lower, each, theme)
        style_axes(lower, "", theme)
        lower.set_xlabel("confidence, %", color=theme.muted)
    grid[1, 0].set_ylim(0.7, 1.5 * max(each.images.max() for each in calibrations.values()))
    grid[0, 0].set_ylabel("accuracy, %", color=theme.muted)
    grid[1, 0].set_ylabel("images", color=theme.muted)
    save_figure(figure, path)


def _draw_reliability(axes: Axes, each: Calibration, theme: Theme) -> None:
    axes.plot((0, 100), (0, 100), color=theme.muted, ls="--", lw=1)
    filled = np.flatnonzero(each.images)
    hits = np.rint(each.images[filled] * each.accuracy[filled]).astype(int)
    intervals = [accuracy_interval(np.arange(n) < k) for n, k in zip(each.images[filled], hits, strict=True)]
    accuracy = 100 * each.accuracy[filled]
    ends = 100 * np.array([(interval.low, interval.high) for interval in intervals]).reshape(-1, 2).T
    errors = np.abs(ends - accuracy)
    style: dict[str, Any] = {"color": theme.ink, "marker": "o", "ms": 4, "lw": 1.4, "elinewidth": 0.9, "capsize": 2}
    axes.errorbar(100 * each.confidence[filled], accuracy, yerr=errors, **style)
    axes.set_xlim(0, 102)
    axes.set_ylim(-2, 102)


def _draw_images(axes: Axes, each: Calibration, theme: Theme) -> None:
    width = 100 / len(each.images)
    axes.bar(
        width * (np.arange(len(each.images)) + 0.5), each.images, width, color=theme.line, edgecolor=theme.ink, lw=0.8
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


def plot_token_cosines(path: Path | BinaryIO, cosines: dict[str, list[LayerCosine]], theme: Theme = LIGHT) -> None:
    """Plot the cosine between class and distillation token against the layer, a line per model."""
    figure = Figure((8, 4), dpi=DPI, layout="constrained", facecolor=theme.page)
    if cosines:
        axes, depth = figure.subplots(), max(len(layers) for layers in cosines.values()) - 3
        for number, (name, layers) in enumerate(cosines.items()):
            # next to one another, so that bars of different models do not hide each other
            places = [_place(each.layer, depth) + 0.08 * (number - (len(cosines) - 1) / 2) for each in layers]
            style: dict[str, Any] = {"color": theme.curves[number % len(theme.curves)], "marker": MARKERS[number % len(MARKERS)]}
            style |= {"ls": LINE_STYLES[number % len(LINE_STYLES)], "label": plain_text(name), "ms": 5, "lw": 1.5}
            deviations = [each.deviation for each in layers]
            axes.errorbar(places, [each.mean for each in layers], yerr=deviations, elinewidth=0.9, capsize=2, **style)
        style_axes(axes, "cosine between class and distillation token", theme)
        axes.set_ylim(None, max(1.02, axes.get_ylim()[1]))  # bars may reach above 1
        step = -(-depth // 12)
        blocks = range(step, depth + 1, step)
        ticks = [_place(PARAMETERS, depth), _place(INPUT, depth), *blocks, _place(NORM, depth)]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.set_xticks(ticks, [PARAMETERS, INPUT, *map(str, blocks), NORM])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("layer (a number: after that block)", color=theme.muted)
        axes.legend(frameon=False, handlelength=3.5, labelcolor=theme.ink)
    else:
        figure.text(0.5, 0.5, "no model has a trained distillation token", ha="center", color=theme.muted)
    save_figure(figure, path)


def _place(layer: str, depth: int) -> int:
    """A layer's place on the horizontal axis: a block's number, those before to its left, the final norm to its right."""
    return int(layer) if layer.isdigit() else {PARAMETERS: -1, INPUT: 0, NORM: depth + 1}[layer]
