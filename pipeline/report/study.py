"""The table of a study, from its cells: mean, standard deviation and number of seeds.

cells.csv has a line per cell and metric, and everything else is made from it alone.
"""

import csv
import io
import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from pipeline.common.errors import UsageError
from pipeline.common.files import write_csv, write_text
from pipeline.common.wording import count_of

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""
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
        """The sample standard deviation; NaN for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def show(self) -> str:
        """For example `93.96 ± 0.21 (3 seeds)`; accuracies in percent."""
        number = (lambda value: f"{100 * value:.2f}") if is_share(self.metric) else short_number
        spread = f" ± {number(self.deviation)}" if len(self.values) > 1 else ""
        return f"{number(self.mean)}{spread} ({count_of(len(self.values), 'seed')})"


def is_share(metric: str) -> bool:
    """Whether a metric is an accuracy, or another share of the images, in 0..1."""
    return any(part in ("top1", "top5", "disagreement") for part in metric.replace(".", "_").split("_"))


def heading(metric: str) -> str:
    return f"{metric}, %" if is_share(metric) else metric


def short_number(value: float) -> str:
    """With four digits, or all of a number of thousands."""
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


def table_rows(summaries: Sequence[Summary], several: Collection[str] = ()) -> Table:
    """A row per combination of levels with a column per metric; axes of one level are left out.

    Args:
        several: axes that have several levels, although there may be results of one only.
    """
    varying = {*varying_axes(summaries), *several}
    axes = [axis for axis in dict.fromkeys(axis for each in summaries for axis in each.levels) if axis in varying]
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
    write_csv(path, ["cell", *axes, "seed", "run", "metric", "value"], rows)


def read_cells(path: Path) -> list[Value]:
    """Read cells.csv.

    Raises:
        UsageError: it cannot be read, or is not a cells.csv.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
        if any(None in (*row, *row.values()) for row in rows):
            raise ValueError("a line with more or fewer values than columns")
        if not all(math.isfinite(float(row["value"])) for row in rows):
            raise ValueError("a value that is not finite")
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


def write_tables(path: Path, markdown: Path, summaries: Sequence[Summary], tables: Sequence[Table]) -> None:
    """Write the means as CSV, a line each, and `tables` as Markdown."""
    axes = list(dict.fromkeys(axis for each in summaries for axis in each.levels))
    rows = [
        {**each.levels, "metric": each.metric, "mean": each.mean, "seeds": len(each.values)}
        | {"standard_deviation": each.deviation if len(each.values) > 1 else ""}
        for each in summaries
    ]
    write_csv(path, [*axes, "metric", "mean", "standard_deviation", "seeds"], rows)
    texts = [tabulate(lines, headings, tablefmt="github", disable_numparse=True) for headings, lines in tables]
    write_text(markdown, "\n\n".join(texts) + "\n")
