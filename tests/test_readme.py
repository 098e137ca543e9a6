"""The README's commands work, and what it links to is there."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import write_folders

from pipeline.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if re.match(r"(make|pipeline|dvc|source) ", line)
]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project as cloned, with images under the names that the README uses."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "dvc.yaml", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    write_folders(tmp_path / "photos/train", {"cat": 3, "dog": 3})
    write_folders(tmp_path / "photos/val", {"cat": 1, "dog": 1})
    return tmp_path


def test_the_two_commands_stand_first():
    assert [command for command in COMMANDS if command.startswith("make")][:2] == ["make demo", "make test"]


def test_make_knows_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make"):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command


SMALL = [
    "teacher.model=regnety_002", "teacher.kwargs={depth: 8, output_stride: 8}", "teacher.epochs=1",
    "teacher.precision=float32", "teacher.min_top1=0", "teacher.workers=0", "teacher_logits.workers=0",
    "teacher_logits.views=12", "teacher_logits.precision=float32", "data.workers=1", "evaluate.workers=0",
    "finetune.views=12",
]  # fmt: skip


def run(*command: str) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, (command, result.output)


def test_the_commands_of_the_pipeline_run_in_their_order(project):
    commands = [shlex.split(command, comments=True)[1:] for command in COMMANDS if command.startswith("pipeline")]
    assert len(commands) >= 8
    configured = next(command for command in commands if command[0] == "configure")
    for command in commands:
        if command[0] in ("teacher-logits", "views"):  # they are shown after `dvc repro` or `prepare` did theirs
            run("prepare", "--set", "data.workers=1")
        if command == ["store", "info"]:  # it is shown after a store was made: here, a small one
            run(*configured, *SMALL)
            for stage in ("prepare", "teacher", "teacher-logits"):
                run(stage)
        run(*command)


def test_every_inline_command_names_a_real_one():
    for name in re.findall(r"`(?:python -m )?pipeline ([a-z-]+)", README):
        assert name in main.commands, name


def test_every_file_that_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_module_stands_in_the_file_map():
    for path in [*(ROOT / "pipeline").glob("*.py")]:
        if not path.name.startswith("__"):
            assert path.name in README, path.name
