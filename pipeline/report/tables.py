"""Tables of results: rows, columns, plain text, JSON and CSV files."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.common.files import atomic_write
from pipeline.report.classes import ClassResult, Confusion
from pipeline.report.comparison import Comparison
from pipeline.report.intervals import Estimate


@dataclass(frozen=True)
class Result:
    """A row of the results: one classifier of a model, and the model's cost."""

    model: str
    detail: str
    """Architecture and resolution."""
    classifier: str
    top1: float
    """Share in 0..1, as is top5."""
    top5: float
    parameters: int
    macs: int
    """Multiply-adds per image."""
    throughput: float
    """Images per second."""


@dataclass(frozen=True)
class SizeResult:
    """A row of sizes.csv: one classifier of a model at another size than it was trained at, or at the same."""

    model: str
    trained: int
    """Pixels per side, as is size."""
    size: int
    classifier: str
    top1: float
    top5: float


@dataclass(frozen=True)
class Column:
    """A number of a Result: its heading, how it is printed, and whether the highest one is marked."""

    heading: str
    value: Callable[[Result], float]
    text: Callable[[float], str]
    of_model: bool = True
    """Whether all classifiers of a model share it: a cost, and no contest."""

    def show(self, row: Result) -> str:
        return self.text(self.value(row))

    def show_best(self, results: list[Result]) -> str | None:
        """The highest accuracy as printed; None for a cost, or if several rows show the same one."""
        best = self.show(max(results, key=self.value))
        return best if not self.of_model and [self.show(row) for row in results].count(best) == 1 else None


def _short(value: float) -> str:
    """Three significant digits; never with an exponent for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS = (
    Column("top-1 %", lambda row: 100 * row.top1, "{:.2f}".format, of_model=False),
    Column("top-5 %", lambda row: 100 * row.top5, "{:.2f}".format, of_model=False),
    Column("params M", lambda row: row.parameters / 1e6, _short),
    Column("GMACs", lambda row: row.macs / 1e9, _short),
    Column("images/s", lambda row: row.throughput, _short),
)


def by_model(results: list[Result]) -> list[list[Result]]:
    return [list(rows) for _, rows in groupby(results, lambda row: row.model)]


def format_table(results: list[Result]) -> str:
    """The results as plain text, a line per classifier; what a model's classifiers share is printed once."""
    lines = []
    for rows in by_model(results):
        for number, row in enumerate(rows):
            shown = ["" if number and column.of_model else column.show(row) for column in COLUMNS]
            lines.append(["" if number else row.model, row.classifier, *shown])
    return _plain_table(lines, ["model", "classifier", *(column.heading for column in COLUMNS)], texts=2)


def format_sizes(rows: list[SizeResult]) -> str:
    """Top-1 of every model's joint classifier, or of its only one, with a column per size."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    lines = []
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        joint = "mean" if any(row.classifier == "mean" for row in own) else "class"
        shown = {row.size: f"{100 * row.top1:.2f}" for row in own if row.classifier == joint}
        lines.append([f"{name} ({own[0].trained} px)", *(shown.get(size, "") for size in sizes)])
    return _plain_table(lines, ["top-1 % at", *(f"{size} px" for size in sizes)], texts=1)


def _plain_table(lines: list[list[str]], headings: list[str], texts: int) -> str:
    """Aligned columns; the first `texts` hold text, the others numbers."""
    aligned = ["left"] * texts + ["right"] * (len(headings) - texts)
    # the headings as a row: tabulate pads its own headers
    table = tabulate([headings, *lines], tablefmt="plain", disable_numparse=True, colalign=aligned)
    return "\n".join(line.rstrip() for line in table.splitlines())


def write_tables(
    folder: Path,
    results: list[Result],
    intervals: dict[tuple[str, str], Estimate],
    sizes: list[SizeResult],
    disagreement: dict[str, dict[str, float]],
    identities: dict[str, dict[str, str]],
) -> None:
    """Write metrics.json, throughput.json, accuracy.csv, sizes.csv and disagreement.csv.

    Args:
        identities: what identifies each model's weights, as metrics.json names it.
        intervals: of top-1, by model and classifier.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for row in results:
        about = {**identities[row.model], "parameters": row.parameters, "gmacs": row.macs / 1e9}
        metrics.setdefault(row.model, about)[row.classifier] = {"top1": row.top1, "top5": row.top5}
    _write_json(folder / "metrics.json", metrics)
    speeds = {row.model: {"images_per_second": round(row.throughput, 1)} for row in results}
    _write_json(folder / "throughput.json", speeds)
    rows = [
        asdict(row) | {"top1_low": interval.low, "top1_high": interval.high}
        for row in results
        for interval in [intervals[row.model, row.classifier]]
    ]
    _write_csv(folder / "accuracy.csv", ["model", "classifier", "top1", "top1_low", "top1_high", "top5"], rows)
    columns = [field.name for field in fields(SizeResult)]
    _write_csv(folder / "sizes.csv", columns, (asdict(row) for row in sizes))
    pairs = (
        {"first": first, "second": second, "share": share}
        for first, row in disagreement.items()
        for second, share in row.items()
    )
    _write_csv(folder / "disagreement.csv", ["first", "second", "share"], pairs)


def write_comparisons(
    folder: Path, comparisons: list[Comparison], classes: list[ClassResult], confusions: list[Confusion]
) -> None:
    """Write comparison.csv, classes.csv and confusions.csv."""
    rows = (
        {"first": c.first, "second": c.second, "top1_difference": c.difference.value, "low": c.difference.low}
        | {"high": c.difference.high}
        for c in comparisons
    )
    _write_csv(folder / "comparison.csv", ["first", "second", "top1_difference", "low", "high"], rows)
    models = list(classes[0].top1)
    by_class = ({"class": row.name, "images": row.images, **row.top1} for row in classes)
    _write_csv(folder / "classes.csv", ["class", "images", *models], by_class)
    columns = [field.name for field in fields(Confusion)]
    _write_csv(folder / "confusions.csv", columns, (asdict(row) for row in confusions))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
