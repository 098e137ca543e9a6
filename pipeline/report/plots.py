"""Pictures of a finished run, as PNG: curves, disagreement, and what the teacher saw.

Every file is written whole or not at all. Nothing here computes a result: it shows what it is given.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.common.files import atomic_write

DPI = 150
# Okabe and Ito's colours, told apart with any colour vision; yellow left out, it vanishes on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP"
DASHES = (0, (2, 1.5))
INK, MUTED = "#1c1e21", "#5d6570"


@dataclass(frozen=True)
class SeenView:
    """One view of a training image, as rendered and as the teacher judged it."""

    number: int
    picture: np.ndarray
    """uint8 (P, P, 3), before mixing."""
    mixed: np.ndarray
    """uint8 (P, P, 3)"""
    kind: str
    """none, mixup or cutmix"""
    lam: float
    """Weight of the image's own label."""
    partner: str
    """Label of the image that it was mixed with."""
    answer: str
    """The teacher's class; empty where there is no teacher."""
    probability: float | None
    """What the teacher gave that class; None where the store holds the class alone."""


@dataclass(frozen=True)
class Sample:
    """A training image and some of its views."""

    label: str
    original: np.ndarray
    """uint8 (height, width, 3)"""
    views: list[SeenView]


def plot_curves(path: Path, curves: dict[str, list[dict[str, str]]]) -> None:
    """Loss and validation top-1 against the epoch, as PNG.

    Args:
        curves: name of each run, and of each epoch its epoch, loss, val_top1_class, val_top1_mean
            (empty where there was no validation), as `read_curve` gives them. A run without epochs is left out.
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
    _save(figure, path)


def _draw(axes: Axes, epochs: list[dict[str, str]], column: str, scale: float, style: dict) -> bool:
    """A column against the epoch, where it has values; False if it has none."""
    rows = [row for row in epochs if row.get(column)]
    values = [scale * float(row[column]) for row in rows]
    if rows:
        # a few marks a line tell runs apart without colour
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
    """The paper's Table 4 as a heat map, as PNG: share in 0..1 of samples that two decide differently."""
    names = list(table)
    shares = np.array([[table[a][b] for b in names] for a in names])
    largest = max(shares.max(), 1e-9)
    labels = [_short_name(name, 28) for name in names]
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
    axes.set_xlabel("decided differently, % of validation images", color=MUTED, labelpad=8)
    _save(figure, path)


CELL, CAPTION, HEADING, GAP, GROUP_GAP = 1.4, 0.66, 0.34, 0.1, 0.16  # inches


def draw_views(path: Path, samples: list[Sample]) -> None:
    """A contact sheet, as PNG: a row a sample, its original and then each view, plain and mixed."""
    count = max(len(sample.views) for sample in samples)
    width = GAP + (1 + 2 * count) * (CELL + GAP) + count * GROUP_GAP
    height = HEADING + len(samples) * (CELL + CAPTION)
    figure = Figure((width, height), dpi=DPI)
    for row, sample in enumerate(samples):
        bottom = height - HEADING - row * (CELL + CAPTION) - CELL
        for place, (heading, picture, caption) in enumerate(_cells(sample)):
            left = GAP + place * (CELL + GAP) + (place + 1) // 2 * GROUP_GAP
            axes = figure.add_axes((left / width, bottom / height, CELL / width, CELL / height))
            axes.imshow(_enlarged(picture))
            axes.set_axis_off()
            centre = (left + CELL / 2) / width
            figure.text(centre, (bottom - 0.05) / height, caption, ha="center", va="top", size=8.5, color=INK)
            if row == 0:
                figure.text(centre, (height - 0.2) / height, heading, ha="center", size=9.5, color=MUTED)
    _save(figure, path)


def _cells(sample: Sample) -> list[tuple[str, np.ndarray, str]]:
    """Heading, picture and caption of each cell of a row."""
    label = _short_name(sample.label, 20)
    cells = [("original", sample.original, label)]
    for view in sample.views:
        mixed = f"{view.kind}, λ {view.lam:.2f}\nwith {_short_name(view.partner, 16)}"
        sure = "" if view.probability is None else f", {100 * view.probability:.0f} %"
        answer = f"teacher: {_short_name(view.answer, 13 if sure == '' else 8)}{sure}" if view.answer else ""
        cells.append((f"view {view.number}", view.picture, label))
        caption = f"{'not mixed' if view.kind == 'none' else mixed}\n{answer}"
        cells.append((f"view {view.number}, mixed", view.mixed, caption))
    return cells


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """Repeated to at least a cell's pixels, so that small pictures keep their hard edges."""
    times = -(-int(CELL * DPI) // max(picture.shape[:2]))
    return picture.repeat(times, 0).repeat(times, 1)


def _short_name(text: str, length: int) -> str:
    return _plain(text if len(text) <= length else text[: length - 1] + "…")


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white", metadata={"Software": None})
