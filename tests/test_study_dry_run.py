"""The commands of every shipped study pass their dry run, before there is any data."""

import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import write_folders
from safetensors.torch import save_file
from test_study import ROOT, STUDIES

from pipeline.cli import study
from pipeline.cli.main import main
from pipeline.config.params import record_config


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in STUDIES])
def test_every_command_of_a_shipped_study_passes_its_dry_run(name, in_tmp, monkeypatch):
    for split in ("train", "val"):
        write_folders(in_tmp / split, {"cat": 1, "dog": 1})
    (in_tmp / "examples").symlink_to(ROOT / "examples")  # a teacher of one's own
    monkeypatch.setattr(study, "CONFIGS", ROOT / "configs")
    monkeypatch.setattr(study, "STUDIES", ROOT / "configs/studies")
    matrix = study.find(name, ("data.train=train", *([] if name == "imagenet-table7" else ["data.val=val"])))
    commands = {}
    for cell in matrix.cells:
        record_config(cell.config)
        for command in [*study.setup_commands(cell.config, matrix.study.finetune), study.cell_command(cell)]:
            commands.setdefault((cell.config.name, command[0], "finetune" in command), command)  # it checks all students
        for weights in cell.config.weight_files():  # before there is an index they are only read
            Path(weights).parent.mkdir(parents=True, exist_ok=True)
            save_file({"head.weight": torch.zeros(2, 2)}, weights)
    for (_, first, _), command in commands.items():
        if first != "prepare":
            done = CliRunner().invoke(main, [*command, "--dry-run"])
            assert done.exit_code == 0, (shlex.join(command), done.output)
