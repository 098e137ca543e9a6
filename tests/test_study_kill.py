"""SIGKILL of `pipeline study` in the midst of its commands, started again: the same numbers in the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import small_config, write_folders
from test_study import ROOT, TAUGHT, TINY, call, in_process

from pipeline.cli import study
from pipeline.config.params import dump

pytestmark = pytest.mark.slow
MOMENTS: dict[str, Callable[[], bool]] = {
    "teacher": lambda: trained_runs() == 1,
    "teacher-logits": lambda: any(Path("work/stores").rglob("argmax/c/*")),
    "the second student": lambda: trained_runs() == 3,
}


def trained_runs() -> int:
    """The number of runs that have a checkpoint."""
    return len({path.parent for path in Path("work/state").glob("*/step-*.ckpt")})


def make_project(root: Path) -> None:
    """Images, a base configuration and a study of two students, whose runs save a checkpoint every five steps."""
    write_folders(root / "train", {"cat": 6, "dog": 6})
    write_folders(root / "val", {"cat": 2, "dog": 2}, seed=1)
    often = {"epochs": 20, "eval_epochs": 10, "checkpoint_steps": 5}
    changes = TINY | TAUGHT | {"teacher": TAUGHT["teacher"] | often, "student": TINY["student"] | often}
    (root / "base.yaml").write_text(dump(small_config(root, **changes)))
    matrix = {"base": "base.yaml", "students": ["none", "hard"], "set": {"teacher_logits.views": 40}, "metrics": ["top1", "loss"]}
    (root / "tiny.yaml").write_text(yaml.safe_dump(matrix))


def start() -> subprocess.Popen:
    """The study, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "study", "tiny.yaml", "run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, process_group=0, env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_study_that_is_killed_anywhere_and_started_again_has_the_same_numbers(tmp_path, monkeypatch):
    numbers = {}
    for name, moments in (("undisturbed", ()), ("killed", MOMENTS.values())):
        make_project(tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        for moment in moments:
            process = start()
            while not moment():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.001)
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if moments:
            said, _ = (process := start()).communicate(timeout=120)
            assert process.returncode == 0, said
        else:
            study.run(study.find("tiny.yaml", ()), (), False, in_process([]))
        assert "2 of 2 cells done" in call("study", "tiny.yaml")
        numbers[name] = Path("outputs/studies/tiny/cells.csv").read_bytes()
    assert numbers["killed"] == numbers["undisturbed"]
