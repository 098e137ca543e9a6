"""The teacher's agreement and confidence per view, as text, CSV and PNG."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from pipeline.common.files import write_csv
from pipeline.report.grid import save_figure
from pipeline.report.plots import DPI, LIGHT, LINE_STYLES, MARKERS, style_axes
from pipeline.store.agreement import QUANTITIES, Agreement


def describe_agreement(agreement: Agreement) -> str:
    """Every quantity over all views, in percent, as text."""
    rows = [
        [
            name,
            "none" if math.isnan(mean.overall) else f"{100 * mean.overall:.2f} %",
            f"{int(mean.counts.sum()):,}",
            QUANTITIES[name],
        ]
        for name, mean in agreement.items()
    ]
    headings = ["quantity", "mean", "views", "what is averaged"]
    return tabulate(
        rows, headings, tablefmt="plain", disable_numparse=True, colalign=("left", "right", "right", "left")
    )


def write_agreement(folder: Path, agreement: Agreement) -> None:
    """Write agreement.csv, a row per quantity and view, and agreement.png."""
    rows = [
        {"quantity": name, "view": view, "images": images, "mean": value if images else ""}
        for name, mean in agreement.items()
        for view, (images, value) in enumerate(zip(mean.counts.tolist(), mean.per_view.tolist(), strict=True))
    ]
    write_csv(folder / "agreement.csv", ["quantity", "view", "images", "mean"], rows)
    _draw(folder / "agreement.png", agreement)


def _draw(path: Path, agreement: Agreement) -> None:
    figure = Figure((8, 4.6), dpi=DPI, layout="constrained", facecolor=LIGHT.page)
    axes = figure.subplots()
    for number, (name, mean) in enumerate(agreement.items()):
        views = np.arange(len(mean.counts))
        style: dict[str, Any] = {"color": LIGHT.curves[number], "marker": MARKERS[number], "ms": 5, "lw": 1.5}
        style |= {"ls": LINE_STYLES[number % len(LINE_STYLES)], "markevery": -(-len(views) // 10)}
        if mean.counts.any():
            axes.plot(views, 100 * mean.per_view, label=f"{name}: {100 * mean.overall:.1f} %", **style)
    style_axes(axes, "mean over images, %", LIGHT)
    axes.set_xlabel("view", color=LIGHT.muted)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = {"frameon": False, "handlelength": 3.5, "labelcolor": LIGHT.ink}
    figure.legend(loc="outside lower center", ncols=3, **legend)
    save_figure(figure, path)
