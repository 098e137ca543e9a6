"""report.html: one self-contained page, rendered with Jinja."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.common.files import atomic_write
from pipeline.report.tables import COLUMNS, Result, by_model


def write_report(
    path: Path,
    title: str,
    results: list[Result],
    disagreement: dict[str, dict[str, float]],
    pictures: dict[str, Path],
    facts: dict[str, dict[str, str]],
) -> None:
    """Write a page that opens anywhere, offline: pictures and styles are inside it.

    Args:
        disagreement: the shares that `plot_disagreement` draws.
        pictures: PNG files named curves and views.
        facts: sections about the experiment, each with its terms and their descriptions.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report_template.html").render(
        title=title,
        columns=[(column, column.show_best(results)) for column in COLUMNS],
        models=by_model(results),
        best=max(results, key=lambda row: row.top1),
        disagreement=disagreement,
        largest=max((share for row in disagreement.values() for share in row.values()), default=0) or 1,
        pictures={name: base64.b64encode(picture.read_bytes()).decode() for name, picture in pictures.items()},
        facts=facts,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
