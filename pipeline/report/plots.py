"""Plots of results, as PNG: training curves and disagreement."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.report.grid import save_figure, shorten

DPI = 150
MARKERS = "osD^vP"
LINE_STYLES = ("-", "--", ":", "-.")
DASHES = (0, (2, 1.5))
COLUMNS = 2
LEGEND_CHARACTERS = 130
"""Characters in a row of the curves' legend, counting about six for each line's sample."""


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; those of lines are Okabe and Ito's, which can be told apart with any colour vision."""

    name: str
    page: str
    ink: str
    muted: str
    line: str
    curves: tuple[str, ...]


# without yellow, which is hard to see on white; and lighter ones for a dark page, on which black would vanish
LIGHT = Theme(
    "light", "white", "#1c1e21", "#5d6570", "#e4e6ea",
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
)  # fmt: skip
DARK = Theme(
    "dark", "#1b1e23", "#e8eaed", "#a0a8b3", "#31363e",
    ("#56B4E9", "#F08A4B", "#2DBE92", "#E09BC3", "#F0B93A", "#A5D8F3", "#FFFFFF"),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A run's training curve."""

    objective: str
    """What its loss measures."""
    epochs: list[dict[str, str]]
    """As `read_curve` gives them: epoch, loss, val_top1_class, val_top1_mean (empty where there was no validation)."""


def plot_curves(path: Path | BinaryIO, curves: dict[str, Curve], theme: Theme = LIGHT) -> None:
    """Plot loss, with axes per objective, and validation top-1 against the epoch; runs without epochs are left out."""
    drawn = {name: curve for name, curve in curves.items() if curve.epochs}
    objectives = list(dict.fromkeys(curve.objective for curve in drawn.values()))
    rows = -(-(len(objectives) + 1) // COLUMNS)
    figure = Figure((10, 0.6 + 3.4 * rows), dpi=DPI, layout="constrained", facecolor=theme.page)
    if drawn:
        panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for unused in panels[len(objectives) + 1 :]:
            unused.set_visible(False)
        _draw_curves(figure, dict(zip(objectives, panels[1:], strict=False)), panels[0], drawn, theme)
    else:
        figure.text(0.5, 0.5, "no training was logged", ha="center", color=theme.muted)
    save_figure(figure, path)


def _draw_curves(
    figure: Figure, losses: dict[str, Axes], accuracy: Axes, curves: dict[str, Curve], theme: Theme
) -> None:
    handles, two_heads = [], False
    for number, (name, curve) in enumerate(curves.items()):
        colour, marker = theme.curves[number % len(theme.curves)], MARKERS[number % len(MARKERS)]
        style = {"color": colour, "marker": marker, "lw": 1.6, "ms": 5}
        _draw(losses[curve.objective], curve.epochs, "loss", 1, style)
        both = _draw(accuracy, curve.epochs, "val_top1_mean", 100, style)
        _draw(accuracy, curve.epochs, "val_top1_class", 100, style | {"linestyle": DASHES if both else "-"})
        handles.append(Line2D([], [], label=plain_text(name), **style))
        two_heads |= both
    note = " (dashed: class head alone)" * two_heads
    titles = {accuracy: f"validation top-1, %{note}"}
    titles |= {axes: f"training loss: {objective}" for objective, axes in losses.items()}
    for axes, title in titles.items():
        style_axes(axes, title, theme)
        axes.set_xlabel("epoch", color=theme.muted)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = {"frameon": False, "handlelength": 2.4, "labelcolor": theme.ink}
    columns = max(1, min(6, LEGEND_CHARACTERS // (max(len(plain_text(name)) for name in curves) + 6)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **legend)


def _draw(axes: Axes, epochs: list[dict[str, str]], column: str, scale: float, style: dict) -> bool:
    """Plot a column against the epoch where it has values; False if it has none."""
    rows = [row for row in epochs if row.get(column)]
    values = [scale * float(row[column]) for row in rows]
    if rows:
        # a few markers per line distinguish runs without colour
        axes.plot([float(row["epoch"]) for row in rows], values, markevery=-(-len(rows) // 8), **style)
    return bool(rows)


def style_axes(axes: Axes, title: str, theme: Theme) -> None:
    """Give axes a title, and the look of all plots: few lines, in the theme's colours."""
    axes.set_title(title, loc="left", fontsize=11, color=theme.ink)
    axes.grid(axis="y", color=theme.line, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor(theme.page)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.tick_params(colors=theme.muted, length=0)


def plot_disagreement(path: Path, table: dict[str, dict[str, float]]) -> None:
    """Plot the paper's Table 4 as a heat map: share in 0..1 of samples that two classifiers classify differently."""
    names = list(table)
    shares = np.array([[table[a][b] for b in names] for a in names])
    largest = max(shares.max(), 1e-9)
    labels = [plain_text(name, 28) for name in names]
    side, room = 0.9 * len(names), 0.08 * max(len(label) for label in labels)
    figure = Figure((side + 1.6 * room + 1, 0.6 * side + room + 1), dpi=DPI, layout="constrained", facecolor=LIGHT.page)
    axes = figure.subplots()
    # up to the middle of the scale only, so that dark text is legible on every cell
    axes.imshow(shares / largest, cmap="Blues", vmin=0, vmax=2, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        text = "0" if row == column else f"{100 * share:.1f}"
        axes.text(column, row, text, ha="center", va="center", color=LIGHT.ink)
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="left", rotation_mode="anchor", color=LIGHT.ink)
    axes.set_yticks(range(len(names)), labels, color=LIGHT.ink)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("% of validation images classified differently", color=LIGHT.muted, labelpad=8)
    save_figure(figure, path)


def plain_text(text: str, length: int | None = 60) -> str:
    """Text that matplotlib does not read as mathematics, shortened to a length if there is one."""
    return (text if length is None else shorten(text, length)).replace("$", r"\$")
