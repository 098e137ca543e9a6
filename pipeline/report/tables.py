"""Tables of results: rows, columns, plain text, JSON and CSV files."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.common.files import write_csv, write_json
from pipeline.common.wording import three_digits
from pipeline.models.tokens import LayerCosine
from pipeline.report.analysis import Analysis
from pipeline.report.calibration import Calibration
from pipeline.report.classes import ClassResult, Confusion
from pipeline.report.comparison import Comparison


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
    others: dict[str, float] = field(default_factory=dict, hash=False)
    """Top-1 on additional sets, by name; the same sets in every row of a table."""


@dataclass(frozen=True)
class SizeResult:
    """A row of sizes.csv: one classifier of a model, evaluated at `size`."""

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


COLUMNS = (
    Column("top-1 %", lambda row: 100 * row.top1, "{:.2f}".format, of_model=False),
    Column("top-5 %", lambda row: 100 * row.top5, "{:.2f}".format, of_model=False),
    Column("params M", lambda row: row.parameters / 1e6, three_digits),
    Column("GMACs", lambda row: row.macs / 1e9, three_digits),
    Column("images/s", lambda row: row.throughput, three_digits),
)


def result_columns(results: Sequence[Result]) -> list[Column]:
    """COLUMNS, with the accuracies on additional sets after those on the validation set."""
    further = [
        Column(f"{name} %", lambda row, name=name: 100 * row.others[name], "{:.2f}".format, of_model=False)
        for name in (results[0].others if results else ())
    ]
    own = [column for column in COLUMNS if not column.of_model]
    return [*own, *further, *COLUMNS[len(own) :]]


def by_model(results: list[Result]) -> list[list[Result]]:
    return [list(rows) for _, rows in groupby(results, lambda row: row.model)]


def format_table(results: list[Result]) -> str:
    """The results as plain text, a line per classifier; what a model's classifiers share is printed once."""
    lines, columns = [], result_columns(results)
    for rows in by_model(results):
        for number, row in enumerate(rows):
            shown = ["" if number and column.of_model else column.show(row) for column in columns]
            lines.append(["" if number else row.model, row.classifier, *shown])
    return _plain_table(lines, ["model", "classifier", *(column.heading for column in columns)], texts=2)


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
    sizes: list[SizeResult],
    analysis: Analysis,
    tokens: dict[str, list[LayerCosine]],
    identities: dict[str, dict[str, str]],
) -> None:
    """Write metrics.json, throughput.json, details.json, accuracy.csv, sizes.csv and disagreement.csv.

    Args:
        tokens: cosines of the models with two tokens; the last one, that of the heads' input, is in metrics.json.
        identities: what identifies each model's weights, and images and crop of validation, as metrics.json names it.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for row in results:
        about = {**identities[row.model], "parameters": row.parameters, "gmacs": row.macs / 1e9}
        # rounded, as the last digits depend on which images share a batch
        about["ece"] = round(analysis.calibration[row.model].ece, 6)
        if row.model in tokens:
            about["token_cosine"] = round(tokens[row.model][-1].mean, 6)
        metrics.setdefault(row.model, about)[row.classifier] = {"top1": row.top1, "top5": row.top5, **_others(row)}
    speeds = {row.model: {"images_per_second": round(row.throughput, 1)} for row in results}
    write_json(folder / "throughput.json", speeds)
    write_json(folder / "details.json", analysis.details)
    rows = [
        asdict(row) | {"top1_low": interval.low, "top1_high": interval.high} | _others(row)
        for row in results
        for interval in [analysis.intervals[row.model, row.classifier]]
    ]
    columns = ["model", "classifier", "top1", "top1_low", "top1_high", "top5", *_others(results[0])]
    write_csv(folder / "accuracy.csv", columns, rows)
    columns = [field.name for field in fields(SizeResult)]
    write_csv(folder / "sizes.csv", columns, (asdict(row) for row in sizes))
    pairs = (
        {"first": first, "second": second, "share": share}
        for first, row in analysis.disagreement.items()
        for second, share in row.items()
    )
    write_csv(folder / "disagreement.csv", ["first", "second", "share"], pairs)
    write_json(folder / "metrics.json", metrics)  # last: the others are then of the same evaluation


def _others(row: Result) -> dict[str, float]:
    """The accuracies on additional sets as files name them: real_top1, v2_top1."""
    return {f"{name}_top1": value for name, value in row.others.items()}


def write_comparisons(
    folder: Path, comparisons: list[Comparison], classes: list[ClassResult], confusions: list[Confusion]
) -> None:
    """Write comparison.csv, classes.csv and confusions.csv."""
    rows = (
        {"first": c.first, "second": c.second, "top1_difference": c.difference.value, "low": c.difference.low}
        | {"high": c.difference.high}
        for c in comparisons
    )
    write_csv(folder / "comparison.csv", ["first", "second", "top1_difference", "low", "high"], rows)
    models = list(classes[0].top1)
    by_class = ({"class": row.name, "images": row.images, **row.top1} for row in classes)
    write_csv(folder / "classes.csv", ["class", "images", *models], by_class)
    columns = [field.name for field in fields(Confusion)]
    write_csv(folder / "confusions.csv", columns, (asdict(row) for row in confusions))


def write_evidence(folder: Path, calibration: dict[str, Calibration], tokens: dict[str, list[LayerCosine]]) -> None:
    """Write calibration.csv, a row per model and bin, and token_cosine.csv, a row per model and layer."""
    rows = (
        {"model": name, "low": i / len(each.images), "high": (i + 1) / len(each.images), "images": int(each.images[i])}
        | ({"confidence": each.confidence[i], "accuracy": each.accuracy[i]} if each.images[i] else {})
        for name, each in calibration.items()
        for i in range(len(each.images))
    )
    columns = ["model", "low", "high", "images", "confidence", "accuracy"]
    write_csv(folder / "calibration.csv", columns, rows)
    layers = ({"model": name, **asdict(layer)} for name, each in tokens.items() for layer in each)
    write_csv(folder / "token_cosine.csv", ["model", "layer", "mean", "deviation"], layers)
