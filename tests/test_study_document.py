"""docs/study-cifar10.md: its tables, figures and numbers are those that the files in docs/study give."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import tree
from test_study import ROOT

from pipeline.cli import study as command
from pipeline.cli.main import main
from pipeline.report.differences import Difference, differences
from pipeline.report.study import Value, read_cells

RESULTS = ROOT / "docs/study"
DOCUMENT = (ROOT / "docs/study-cifar10.md").read_text()
STUDIES = [path.stem for path in sorted((ROOT / "configs/studies").glob("cifar10-*.yaml"))]
RUN = [name for name in STUDIES if (RESULTS / f"{name}.csv").exists()]
every_study = pytest.mark.parametrize("name", RUN)


@pytest.fixture(autouse=True)
def configs(in_tmp):
    (in_tmp / "configs").symlink_to(ROOT / "configs")


def section(name: str) -> str:
    """The part of the document about a study: after the heading under which its command stands."""
    (found,) = [text for text in re.split(r"^## ", DOCUMENT, flags=re.M) if f"`pipeline study {name} run`:" in text]
    return found


def compared(name: str, reference: dict[str, str]) -> list[Difference]:
    values = [each for each in read_cells(RESULTS / f"{name}.csv") if each.metric == "top1"]
    return differences(values, reference)


def test_tables_in_the_folder_are_made_from_the_cells():
    done = CliRunner().invoke(main, ["study", "--from", str(RESULTS), "--to", "again"])
    assert done.exit_code == 0, done.output
    texts = {name: content for name, content in tree(Path("again")).items() if not name.endswith(".png")}
    assert texts == {name: content for name, content in tree(RESULTS).items() if name in texts}
    assert len(texts) == 2 * len(RUN)


@every_study
def test_tables_and_figures_in_the_document_are_those_of_the_folder(name):
    for table in (RESULTS / f"{name}.md").read_text().strip().split("\n\n"):
        assert table in section(name)
    assert f"](study/{name}.png)" in section(name)


def test_a_study_without_results_is_named_as_not_run():
    assert RUN
    for name in {*STUDIES} - {*RUN}:
        assert "Not run" in section(name) and "|" not in section(name)


@every_study
def test_numbers_in_the_text_are_in_a_table_of_their_section(name):
    text, tables = ("\n".join(line for line in section(name).splitlines() if line.startswith("|") is table) for table in (False, True))
    numbers = re.findall(r"(?<![\d.])-?\d+\.\d+", text)
    assert [number for number in numbers if number.lstrip("-") not in tables] == []


@every_study
def test_every_cell_has_all_seeds_or_the_document_says_which_are_missing(name):
    values: list[Value] = read_cells(RESULTS / f"{name}.csv")
    missing = {cell.name for cell in command.find(name, ()).cells} - {each.cell for each in values}
    assert not missing or "not run" in section(name).lower()


def test_the_readme_quotes_the_conclusion_on_views_with_its_uncertainty():
    of_token = [each for each in compared("cifar10-views-best", {"views": "30"}) if each.levels["student"] == "token"]
    found = {each.levels["views"]: each.show().replace(" (", " points (") for each in of_token}
    sentence = (
        "Compared with a new view in each of 30 epochs, replaying V stored views per image changed the top-1 of students with"
        f" the distillation token by {found['10']} with V = 10, by {found['3']} with V = 3 and by {found['1']} with V = 1"
        " (means and 95 % intervals)."
    )
    for text in (DOCUMENT, (ROOT / "README.md").read_text()):
        assert sentence in " ".join(text.split())
