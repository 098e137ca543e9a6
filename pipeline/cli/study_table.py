"""`pipeline study`: the table and the figure of what the cells of a study have given so far."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.cli.matching import is_evaluation_of, lacks_sets
from pipeline.cli.scan import number, read_json
from pipeline.cli.status_table import headline_top1
from pipeline.cli.study import Matrix, done_runs, find, studies
from pipeline.common.errors import UsageError
from pipeline.common.wording import count_of
from pipeline.config.cells import Cell, levels_before_finetuning
from pipeline.config.paths import evaluation_folder, teacher_folder
from pipeline.config.study import FINETUNED_COLUMN
from pipeline.report.differences import difference_table, differences
from pipeline.report.study import Value, read_cells, summarize, table_rows, write_cells, write_tables
from pipeline.report.study_figure import draw_figure

FILES = {"evaluation": "metrics.json", "throughput": "throughput.json", "details": "details.json"}
"""Files of `pipeline evaluate`, by the prefix of the metrics that are read from them."""


@dataclass(frozen=True)
class Files:
    """Where the results of a study are written."""

    folder: Path
    cells: str = "cells.csv"
    table: str = "table.csv"
    markdown: str = "table.md"
    figure: str = "figure.png"

    @classmethod
    def of(cls, name: str, folder: Path | None) -> "Files":
        """The files of a study in its own folder, or with its name in a folder of several."""
        if folder is None:
            return cls(Path("outputs") / "studies" / name)
        return cls(folder, f"{name}.csv", f"{name}-table.csv", f"{name}.md", f"{name}.png")


def collect(matrix: Matrix, done: dict[str, str]) -> Iterator[Value]:
    """The metrics of the cells that are done, see `done_runs`."""
    for cell in matrix.cells:
        levels = dict(cell.levels)
        if matrix.study.finetune is True:
            shown = levels if cell.finetuned else levels_before_finetuning(matrix.study, levels)
            levels = shown and {**shown, FINETUNED_COLUMN: "yes" if cell.finetuned else "no"}
        if levels and (run := done.get(cell.name)):
            for metric in matrix.study.metrics:
                if (value := number(read_metric(cell, metric, run))) is not None:
                    yield Value(cell.name, levels, cell.seed, run, metric, float(value))


def read_metric(cell: Cell, metric: str, run: str) -> Any:
    """A metric of a cell, or None.

    Args:
        run: the cell's; an evaluation of another run, or on other images, has no metrics for it.
    """
    source, _, key = metric.partition(".")
    metrics = read_json(cell.folder / "metrics.json")
    if source == "teacher" and key:
        return read_json(teacher_folder(cell.config) / "metrics.json").get(key)
    if source in FILES and key:
        folder = evaluation_folder(cell.config)
        evaluated = read_json(folder / "metrics.json").get(cell.folder.name, {})
        if evaluated.get("run") != run or not is_evaluation_of(evaluated, metrics | {"run": run}):
            return None
        if key.endswith("_top1") and lacks_sets({cell.folder.name: evaluated}, cell.config):
            return None
        found: Any = read_json(folder / FILES[source]).get(cell.folder.name)
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found
    return headline_top1(metrics) if metric == "top1" else metrics.get(metric)


def show(matrix: Matrix, cells: Path | None, folder: Path | None) -> None:
    """Print the table so far, and write cells, table and figure.

    Args:
        cells: a file of cells to read instead of the cells' metrics.
        folder: where to write; None: outputs/studies/NAME.
    """
    done = {} if cells else done_runs(matrix.cells)
    values = read_cells(cells) if cells else list(collect(matrix, done))
    files = Files.of(matrix.name, folder)
    if cells is None:
        print(f"{matrix.name}: {len(done)} of {count_of(len(matrix.cells), 'cell')} done")
        if not done:
            print(f"nothing to show yet; run: pipeline study {matrix.argument} run")
            return
    known = {each.metric for each in values}
    if absent := [metric for metric in matrix.study.metrics if metric not in known]:
        print(f"no cell has the metric {', '.join(absent)}" + " yet" * bool(matrix.study.evaluate))
    if not values:
        return
    summaries = summarize(values)
    tables = [table_rows(summaries, {axis for axis, levels in matrix.study.axes.items() if len(levels) > 1})]
    first = next((metric for metric in matrix.study.metrics if metric in known), values[0].metric)
    for reference in matrix.study.reference:
        if compared := differences([each for each in values if each.metric == first], reference):
            tables.append(difference_table(compared, reference))
    for headings, lines in tables:
        print("\n" + tabulate(lines, headings, tablefmt="plain", disable_numparse=True))
    print()
    if cells is None:
        write_cells(files.folder / files.cells, values)
    write_tables(files.folder / files.table, files.folder / files.markdown, summaries, tables)
    draw_figure(files.folder / files.figure, summaries, first, matrix.study.figure)
    written = [*([files.cells] if cells is None else []), files.table, files.markdown, files.figure]
    print(f"{files.folder}: {', '.join(sorted(written))}")


def show_all(source: Path, folder: Path | None) -> None:
    """Make tables and figures again from the file NAME.csv of every study that has one in a folder.

    Args:
        folder: where to write; None: there.

    Raises:
        UsageError: no study has one.
    """
    found = {name: source / f"{name}.csv" for name in studies() if (source / f"{name}.csv").exists()}
    if not found:
        raise UsageError(f"{source}", expected="a file NAME.csv of a study", found="none", do="pipeline study NAME --to FOLDER writes it")
    for name, cells in found.items():
        print(f"{name}: from {cells}")
        show(find(name, ()), cells, folder or source)
