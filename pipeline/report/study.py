"""The table and the figure of a study, from its cells: mean, standard deviation and number of seeds.

cells.csv has a line per cell and metric, and everything else is made from it alone.
"""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from tabulate import tabulate

from pipeline.common.errors import UsageError
from pipeline.common.files import atomic_write
from pipeline.common.wording import count_of
from pipeline.report.grid import save_figure
from pipeline.report.plots import DPI, LIGHT, LINE_STYLES, MARKERS

OWN_COLUMNS = ("cell", "seed", "run", "metric", "value")
"""Columns of cells.csv besides the axes."""


@dataclass(frozen=True)
class Value:
    """A metric of one cell."""

    cell: str
    levels: dict[str, str]
    """By axis."""
    seed: int
    run: str
    """Fingerprint of the run."""
    metric: str
    value: float


@dataclass(frozen=True)
class Summary:
    """A metric over the seeds of the same levels."""

    levels: dict[str, str]
    metric: str
    values: tuple[float, ...]
    """One per seed."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation; NaN of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def show(self) -> str:
        """For example `93.96 ± 0.21 (3 seeds)`; accuracies in percent."""
        number = (lambda value: f"{100 * value:.2f}") if is_share(self.metric) else _number
        spread = f" ± {number(self.deviation)}" if len(self.values) > 1 else ""
        return f"{number(self.mean)}{spread} ({count_of(len(self.values), 'seed')})"


def is_share(metric: str) -> bool:
    """Whether a metric is an accuracy in 0..1."""
    return any(part in ("top1", "top5") for part in metric.replace(".", "_").split("_"))


def heading(metric: str) -> str:
    return f"{metric}, %" if is_share(metric) else metric


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def summarize(values: Iterable[Value]) -> list[Summary]:
    """Values of the same levels and metric together, in the order of their first.

    Raises:
        UsageError: there are two values of one seed.
    """
    found: dict[tuple, dict[int, float]] = {}
    levels: dict[tuple, dict[str, str]] = {}
    for each in values:
        key = (*each.levels.items(), each.metric)
        levels[key] = each.levels
        if each.seed in found.setdefault(key, {}):
            raise UsageError(f"{each.cell}: {each.metric}", expected="one value per seed", found=f"two of seed {each.seed}")
        found[key][each.seed] = each.value
    return [Summary(levels[key], key[-1], tuple(seeds.values())) for key, seeds in found.items()]


def table_rows(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row per combination of levels with a column per metric; axes of one level are left out."""
    axes = varying_axes(summaries)
    metrics = list(dict.fromkeys(each.metric for each in summaries))
    rows: dict[tuple, dict[str, str]] = {}
    for each in summaries:
        rows.setdefault(tuple(each.levels.get(axis, "") for axis in axes), {})[each.metric] = each.show()
    lines = [[*levels, *(shown.get(metric, "") for metric in metrics)] for levels, shown in rows.items()]
    return [*axes, *map(heading, metrics)], lines


def varying_axes(summaries: Sequence[Summary]) -> list[str]:
    """The axes of which there are several levels, or the first if there are none."""
    levels: dict[str, set[str]] = {}
    for each in summaries:
        for axis, level in each.levels.items():
            levels.setdefault(axis, set()).add(level)
    return [axis for axis, found in levels.items() if len(found) > 1] or [*levels][:1]


def write_cells(path: Path, values: Sequence[Value]) -> None:
    """Write cells.csv: the cell, its levels, seed and run, and the value of a metric per line."""
    axes = list(dict.fromkeys(axis for each in values for axis in each.levels))
    rows = [
        {"cell": each.cell, **each.levels, "seed": each.seed, "run": each.run, "metric": each.metric, "value": each.value}
        for each in values
    ]
    _write_csv(path, ["cell", *axes, "seed", "run", "metric", "value"], rows)


def read_cells(path: Path) -> list[Value]:
    """Read cells.csv.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
        return [
            Value(row["cell"], {axis: level for axis, level in row.items() if axis not in OWN_COLUMNS}, int(row["seed"]),
                  row["run"], row["metric"], float(row["value"]))
            for row in rows
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}", expected=f"a cells.csv with the columns {', '.join(OWN_COLUMNS)}", found=f"{type(error).__name__}: {error}",
            do="name a file that pipeline study wrote",
        ) from None  # fmt: skip


def write_summaries(folder: Path, summaries: Sequence[Summary], x: str | None, log: bool) -> None:
    """Write table.csv, table.md and figure.png.

    Args:
        x: the axis of the figure; None: a dot for every row of the table.
        log: whether that axis is logarithmic.
    """
    axes = list(dict.fromkeys(axis for each in summaries for axis in each.levels))
    rows = [
        {**each.levels, "metric": each.metric, "mean": each.mean, "seeds": len(each.values)}
        | {"standard_deviation": each.deviation if len(each.values) > 1 else ""}
        for each in summaries
    ]
    _write_csv(folder / "table.csv", [*axes, "metric", "mean", "standard_deviation", "seeds"], rows)
    headings, lines = table_rows(summaries)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(tabulate(lines, headings, tablefmt="github", disable_numparse=True) + "\n")
    shown = [each for each in summaries if each.metric == summaries[0].metric]
    (draw_lines(folder / "figure.png", shown, x, log) if x else draw_dots(folder / "figure.png", shown))


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw_lines(path: Path, summaries: Sequence[Summary], x: str, log: bool) -> None:
    """Plot one metric against an axis: means with standard deviations, a line per combination of the other axes."""
    others = [axis for axis in varying_axes(summaries) if axis != x]
    lines: dict[str, list[Summary]] = {}
    for each in summaries:
        lines.setdefault(", ".join(_level(axis, each) for axis in others), []).append(each)
    figure = Figure((6.4, 4.2), dpi=DPI, layout="constrained", facecolor=LIGHT.page)
    axes = figure.subplots()
    styles = zip(itertools.cycle(LIGHT.curves), itertools.cycle(MARKERS), itertools.cycle(LINE_STYLES))
    for (label, found), (colour, marker, style) in zip(lines.items(), styles, strict=False):
        points = sorted(found, key=lambda each: float(each.levels[x]))
        places = [float(each.levels[x]) for each in points]
        axes.errorbar(places, *_means(points), label=label, color=colour, marker=marker, ls=style, ms=5, lw=1.5, capsize=3)
    if log:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({float(each.levels[x]) for each in summaries})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(_plain(x), color=LIGHT.muted)
    _finish(axes, summaries, "y")
    if any(lines):
        axes.legend(frameon=False, handlelength=3.5, labelcolor=LIGHT.ink)
    save_figure(figure, path)


def draw_dots(path: Path, summaries: Sequence[Summary]) -> None:
    """Plot one metric: a dot with its standard deviation for each combination of levels, below each other."""
    names = varying_axes(summaries)
    labels = [", ".join(_level(axis, each) for axis in names) for each in summaries]
    figure = Figure((6.4, 1.0 + 0.3 * len(labels)), dpi=DPI, layout="constrained", facecolor=LIGHT.page)
    axes = figure.subplots()
    means, deviations = _means(summaries)
    axes.errorbar(means, range(len(labels)), xerr=deviations, color="#000000", marker="o", ls="", ms=5, capsize=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    _finish(axes, summaries, "x")
    save_figure(figure, path)


def _level(axis: str, each: Summary) -> str:
    """A level as it stands in a legend: numbers with their axis."""
    level = each.levels.get(axis, "")
    return _plain(f"{axis} {level}" if level.replace(".", "").isdigit() else level)


def _means(summaries: Sequence[Summary]) -> tuple[list[float], list[float]]:
    scale = 100 if is_share(summaries[0].metric) else 1
    deviations = [0.0 if math.isnan(each.deviation) else scale * each.deviation for each in summaries]
    return [scale * each.mean for each in summaries], deviations


def _finish(axes: Axes, summaries: Sequence[Summary], value_axis: str) -> None:
    """Name the axis of values, and say what the bars are."""
    counts = sorted({len(each.values) for each in summaries})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = f"{_plain(heading(summaries[0].metric))} (mean ± standard deviation of {seeds} seeds)"
    (axes.set_ylabel if value_axis == "y" else axes.set_xlabel)(text, color=LIGHT.muted)
    axes.grid(axis="both", color=LIGHT.line, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=LIGHT.muted, length=0)


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
