"""docs/configuration.md says what the code says, about every key."""

import re
from pathlib import Path

import pytest

from pipeline.cli.reference import describe_type, reference
from pipeline.config.schema import Config
from pipeline.config.sections import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def rows(text: str) -> dict[str, list[str]]:
    """The cells of every row by `heading key`."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:].strip("`")
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\\\)\|", line)[1:-1]]
            found[f"{heading} {cells[0].strip('`')}"] = cells
    return found


def test_the_page_is_what_the_command_in_it_writes():
    assert PAGE.read_text() == reference(), "run: python -m pipeline.cli.reference > docs/configuration.md"


def test_every_key_is_on_the_page_with_a_type_a_default_and_a_meaning():
    table = rows(reference())
    for section, values in Config().model_dump(by_alias=True).items():
        if section in ("variants", "students", "name", "work"):
            assert f"Top level {section}" in table
        else:
            for key in values:
                assert f"{section} {key}" in table or f"Training {key}" in table, f"{section}.{key}"
    for name, cells in table.items():
        assert len(cells) == 4 and all(cells), name


def test_a_section_shows_its_own_default_where_it_differs_from_the_shared_one():
    table = rows(reference())
    assert table["Training batch_size"][2] == "`1024`"
    assert table["finetune batch_size"][2] == "`512`"
    assert "student batch_size" not in table


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("size", "integer (8 to 4,096)"),
        ("seed", "integer (64 bits)"),
        ("scale", "2 numbers"),
        ("auto_augment", "string or null"),
        ("group_size", "integer (2 to 1,024, a multiple of 2)"),
    ],
)
def test_a_type_is_given_in_words_with_its_range(key, words):
    assert describe_type(Recipe.model_json_schema()["properties"][key]) == words
