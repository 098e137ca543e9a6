"""Tables of a finished run, and one self-contained report.html.

Every file is written whole or not at all. Nothing here computes a result: it shows what it is given.
"""

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from pipeline.common.files import atomic_write


@dataclass(frozen=True)
class Result:
    """A row of the results: one way of one model to decide, and the model's cost."""

    model: str
    detail: str
    """Architecture and resolution."""
    classifier: str
    top1: float
    """Share in 0..1, as is top5."""
    top5: float
    parameters: int
    macs: int
    """Multiply-adds of one picture."""
    throughput: float
    """Pictures a second."""


@dataclass(frozen=True)
class Column:
    """A number of a Result: its heading, how it is printed, and which value is the best."""

    heading: str
    value: Callable[[Result], float]
    text: Callable[[float], str]
    best: Callable[[Iterable[float]], float]
    of_model: bool = True
    """The same for all classifiers of a model."""


def _short(value: float) -> str:
    """Three significant digits, never with an exponent where a reader would not want one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS = (
    Column("top-1 %", lambda row: 100 * row.top1, "{:.2f}".format, max, of_model=False),
    Column("top-5 %", lambda row: 100 * row.top5, "{:.2f}".format, max, of_model=False),
    Column("params M", lambda row: row.parameters / 1e6, _short, min),
    Column("GMACs", lambda row: row.macs / 1e9, _short, min),
    Column("images/s", lambda row: row.throughput, _short, max),
)


def _best(column: Column, results: list[Result]) -> str | None:
    """The printed best of a column, so that ties on paper are ties; None where all are the same."""
    values = [column.value(row) for row in results]
    different = len({column.text(value) for value in values}) > 1
    return column.text(column.best(values)) if different else None


def format_table(results: list[Result]) -> str:
    """The results as aligned plain text, a line for each classifier of each model."""
    lines = [["model", "classifier", *(column.heading for column in COLUMNS)]]
    for _, group in groupby(results, lambda row: row.model):
        for number, row in enumerate(group):
            shown = ["" if number and c.of_model else c.text(c.value(row)) for c in COLUMNS]
            lines.append(["" if number else row.model, row.classifier, *shown])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    aligns = "<<" + ">" * len(COLUMNS)
    padded = [[f"{cell:{align}{width}}" for align, cell, width in zip(aligns, line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


SEEN = """<h2>What the students saw</h2>
<p>Training images, some of their views, and the mixed pictures: λ is the weight of the image's own label. Where there
is a teacher, it judged exactly these pictures.</p>
<div class="card scroll"><img class="wide"
alt="Training images, views and mixed pictures, with the teacher's answers where there is one" src="{}"></div>"""


def write_report(
    path: Path,
    title: str,
    results: list[Result],
    table: dict[str, dict[str, float]],
    pictures: dict[str, Path],
    facts: dict[str, dict[str, str]],
) -> None:
    """One HTML file that needs no other: styles and pictures are inside, there are no scripts.

    Args:
        table: as `plot_disagreement` takes it.
        pictures: PNGs `curves` and `views`.
        facts: what the run was: of each heading, terms and what they are.
    """
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        summary=escape(_summary(results)),
        results=_results_table(results),
        disagreement=_disagreement_table(table),
        facts="\n".join(_facts(heading, terms) for heading, terms in facts.items()),
        curves=_inside(pictures["curves"]),
        seen=SEEN.format(_inside(pictures["views"])),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _inside(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _summary(results: list[Result]) -> str:
    best = max(results, key=lambda row: row.top1)
    return f"Best top-1: {100 * best.top1:.2f} %, {best.model} ({best.classifier})"


def _results_table(results: list[Result]) -> str:
    best = [_best(column, results) for column in COLUMNS]
    heads = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in COLUMNS)
    parts = [f'<thead><tr><th scope="col">model</th><th scope="col">classifier</th>{heads}</tr></thead>']
    for _, group in groupby(results, lambda row: row.model):
        rows = list(group)
        span = f' rowspan="{len(rows)}"'
        parts.append("<tbody>")
        for number, row in enumerate(rows):
            name = f'<th scope="rowgroup"{span}>{escape(row.model)}<small>{escape(row.detail)}</small></th>'
            cells = ["" if number else name, f'<td class="text">{escape(row.classifier)}</td>']
            for column, winner in zip(COLUMNS, best, strict=True):
                if not column.of_model or number == 0:
                    text = column.text(column.value(row))
                    shown = f"<strong>{text}</strong>" if text == winner else text
                    cells.append(f"<td{span if column.of_model else ''}>{shown}</td>")
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</tbody>")
    return f"<table>{''.join(parts)}</table>"


def _disagreement_table(table: dict[str, dict[str, float]]) -> str:
    largest = max((share for row in table.values() for share in row.values()), default=0) or 1
    lines = ["<th></th>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in table)]
    for name, row in table.items():
        cells = [
            f'<td style="--heat:{share / largest:.3f}">{"0" if other == name else f"{100 * share:.1f}"}</td>'
            for other, share in row.items()
        ]
        lines.append(f'<th scope="row">{escape(name)}</th>{"".join(cells)}')
    return '<table class="heat">' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _facts(heading: str, terms: dict[str, str]) -> str:
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<section><h3>{escape(heading)}</h3><dl>{entries}</dl></section>"
