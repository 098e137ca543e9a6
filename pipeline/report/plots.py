"""Plots of results, as PNG: training curves and disagreement."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.report.grid import save_figure, shorten

DPI = 150
# Okabe and Ito's palette, distinguishable with any colour vision; without yellow, which is hard to see on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP"
DASHES = (0, (2, 1.5))
INK, MUTED = "#1c1e21", "#5d6570"


def plot_curves(path: Path, curves: dict[str, list[dict[str, str]]]) -> None:
    """Plot loss and validation top-1 against the epoch.

    Args:
        curves: for each run its epochs as `read_curve` gives them: epoch, loss, val_top1_class, val_top1_mean
            (empty where there was no validation). A run without epochs is left out.
    """
    figure = Figure((10, 4.4), dpi=DPI, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    handles, two_heads = [], False
    for number, (name, epochs) in enumerate(curves.items()):
        if not epochs:
            continue
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        style = {"color": colour, "marker": marker, "lw": 1.6, "ms": 5}
        _draw(loss, epochs, "loss", 1, style)
        both = _draw(accuracy, epochs, "val_top1_mean", 100, style)
        _draw(accuracy, epochs, "val_top1_class", 100, style | {"linestyle": DASHES if both else "-"})
        handles.append(Line2D([], [], label=_plain(name), **style))
        two_heads |= both
    note = " (dashed: class head alone)" * two_heads
    for axes, title in ((loss, "training loss"), (accuracy, f"validation top-1, %{note}")):
        _plain_axes(axes, title)
        axes.set_visible(bool(handles))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, handlelength=2.4)
    else:
        figure.text(0.5, 0.5, "no training was logged", ha="center", color=MUTED)
    save_figure(figure, path)


def _draw(axes: Axes, epochs: list[dict[str, str]], column: str, scale: float, style: dict) -> bool:
    """Plot a column against the epoch where it has values; False if it has none."""
    rows = [row for row in epochs if row.get(column)]
    values = [scale * float(row[column]) for row in rows]
    if rows:
        # a few markers per line distinguish runs without colour
        axes.plot([float(row["epoch"]) for row in rows], values, markevery=-(-len(rows) // 8), **style)
    return bool(rows)


def _plain_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("epoch", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e6ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9bec6")
    axes.tick_params(colors=MUTED, length=0)


def plot_disagreement(path: Path, table: dict[str, dict[str, float]]) -> None:
    """Plot the paper's Table 4 as a heat map: share in 0..1 of samples that two classifiers classify differently."""
    names = list(table)
    shares = np.array([[table[a][b] for b in names] for a in names])
    largest = max(shares.max(), 1e-9)
    labels = [_plain(name, 28) for name in names]
    side, room = 0.9 * len(names), 0.08 * max(len(label) for label in labels)
    figure = Figure((side + 1.6 * room + 1, 0.6 * side + room + 1), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    # up to the middle of the scale only, so that dark text is legible on every cell
    axes.imshow(shares / largest, cmap="Blues", vmin=0, vmax=2, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        text = "0" if row == column else f"{100 * share:.1f}"
        axes.text(column, row, text, ha="center", va="center", color=INK)
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="left", rotation_mode="anchor", color=INK)
    axes.set_yticks(range(len(names)), labels, color=INK)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("% of validation images classified differently", color=MUTED, labelpad=8)
    save_figure(figure, path)


def _plain(text: str, length: int = 60) -> str:
    """Shortened text that matplotlib does not read as mathematics."""
    return shorten(text, length).replace("$", r"\$")
