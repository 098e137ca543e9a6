"""SIGKILL at random moments of teacher-logits and train-student, resumed: the same bits in the end."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import loaded, taught, taught_template  # noqa: F401  (fixtures)

from pipeline.layout import student_folder
from pipeline.params import dump

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/killed.py"), ".", *arguments, "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_at_random(chance: random.Random, span_seconds: float, *arguments: str) -> str | None:
    """Start, wait for the work to begin, SIGKILL the group within `span_seconds`.

    Returns what it hit (`write`, `step`, `save` or `between`), or None if the command had ended.
    """
    marks = Path("marks")
    marks.write_text("")
    process = start(*arguments)
    while not marks.read_text() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, span_seconds))
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    under_way = []
    for line in marks.read_text().splitlines():
        name, what = line.split()
        under_way.append(name) if what == "begins" else under_way.pop()
    return under_way[0] if under_way else "between"


def finish(*arguments: str) -> None:
    process = start(*arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def contents(root: str) -> dict[str, bytes]:
    """Every file of the stores; no temporary ones are left."""
    return {str(path): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}


def test_a_store_written_through_five_kills_is_that_of_an_undisturbed_run(taught, capsys):  # noqa: F811
    Path("params.yaml").write_text(dump(loaded("teacher_logits.views=40")))
    for lock in Path("work/stores").glob("*.lock"):
        lock.unlink()
    finish("teacher-logits")
    expected = {path: data for path, data in contents("work/stores").items() if not path.endswith(".lock")}
    shutil.rmtree("work/stores")
    chance, hits = random.Random(0), []
    while len(hits) < 5:
        hit = kill_at_random(chance, 0.7, "teacher-logits")
        if hit is None:  # it was through: begin once more
            shutil.rmtree("work/stores")
            continue
        hits.append(hit)
    finish("teacher-logits")
    with capsys.disabled():
        print(f"\n5 kills of teacher-logits hit: {', '.join(hits)}")
    assert hits.count("write") >= 3
    found = {path: data for path, data in contents("work/stores").items() if not path.endswith(".lock")}
    assert found == expected


def test_a_student_trained_through_five_kills_has_the_weights_of_an_undisturbed_run(taught, capsys):  # noqa: F811
    final = student_folder(loaded(), "hard") / "weights.safetensors"
    finish("train-student", "--student", "hard")
    expected = final.read_bytes()
    shutil.rmtree("work/state")
    final.unlink()
    chance, hits = random.Random(1), []
    while len(hits) < 5:
        hit = kill_at_random(chance, 0.8, "train-student", "--student", "hard")
        if hit is None:
            shutil.rmtree("work/state")
            continue
        hits.append(hit)
    finish("train-student", "--student", "hard")
    with capsys.disabled():
        print(f"\n5 kills of train-student hit: {', '.join(hits)}")
    assert len(hits) - hits.count("between") >= 3
    assert final.read_bytes() == expected
