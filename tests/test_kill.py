"""SIGKILL at random moments of teacher-logits and train-student, resumed: the same bits in the end."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import loaded

from pipeline.config.params import dump
from pipeline.config.paths import student_folder

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


KILLS = int(os.environ.get("KILLS", "0"))  # a campaign by hand: KILLS=100 pytest -m slow tests/test_kill.py


def start(*arguments: str, marks: str = ".", group: int = 0) -> subprocess.Popen:
    """The command in a process group: its own, or that of another process."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/killed.py"), marks, *arguments, "--device", "cpu"],
        env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=group,
    )


def kill_at_random(chance: random.Random, span_seconds: float, *commands: tuple[str, ...]) -> list[str] | None:
    """Start the commands as one process group, wait for their work to begin, SIGKILL it within the span.

    Returns what each was hit in (`write`, `step`, `save` or `between`), or None if one had ended.
    """
    folders = [Path(f"marks-{number}") for number in range(len(commands))]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "marks").write_text("")
    processes: list[subprocess.Popen] = []
    for folder, command in zip(folders, commands, strict=True):
        processes.append(start(*command, marks=str(folder), group=processes[0].pid if processes else 0))
    while not all((folder / "marks").read_text() for folder in folders):
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.01)
    time.sleep(chance.uniform(0, span_seconds))
    ended = any(process.poll() is not None for process in processes)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.communicate()
    return None if ended else [hit_in(folder / "marks") for folder in folders]


def hit_in(marks: Path) -> str:
    under_way: list[str] = []
    for line in marks.read_text().splitlines():
        name, what = line.split()
        under_way.append(name) if what == "begins" else under_way.pop()
    return under_way[0] if under_way else "between"


def finish(*arguments: str) -> None:
    process = start(*arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def contents(root: str) -> dict[str, bytes]:
    """Every file of the stores but the locks beside them; so no temporary ones are left."""
    files = (path for path in sorted(Path(root).rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files if ".lock" not in path.name}


def test_a_store_written_by_two_parts_through_kills_is_that_of_an_undisturbed_run(taught, capsys):
    Path("params.yaml").write_text(dump(loaded("teacher_logits.views=40")))
    finish("teacher-logits")
    expected = contents("work/stores")
    shutil.rmtree("work/stores")
    chance, hits, parts = random.Random(0), [], [("teacher-logits", "--part", f"{part}/2") for part in range(2)]
    while len(hits) < (KILLS or 8):
        hit = kill_at_random(chance, 0.7, *parts)
        if hit is None:  # one was through: begin once more
            for part in parts:
                finish(*part)
            assert contents("work/stores") == expected
            shutil.rmtree("work/stores")
            continue
        hits.append("write" if "write" in hit else hit[0])
    for part in parts:
        finish(*part)
    with capsys.disabled():
        print(f"\n{len(hits)} kills of teacher-logits, {hits.count('write')} of them in a unit's write")
    assert hits.count("write") >= len(hits) / 3
    assert contents("work/stores") == expected


def test_a_student_trained_through_kills_has_the_weights_of_an_undisturbed_run(taught, capsys):
    final = student_folder(loaded(), "hard") / "weights.safetensors"
    command = ("train-student", "--student", "hard")
    finish(*command)
    expected = final.read_bytes()
    shutil.rmtree("work/state")
    final.unlink()
    chance, hits = random.Random(1), []
    while len(hits) < (KILLS or 5):
        hit = kill_at_random(chance, 0.8, command)
        if hit is None:  # it was through: begin once more
            finish(*command)
            assert final.read_bytes() == expected
            shutil.rmtree("work/state")
            continue
        hits += hit
    finish(*command)
    with capsys.disabled():
        print(f"\n{len(hits)} kills of train-student hit: {', '.join(sorted(set(hits)))}")
    assert len(hits) - hits.count("between") >= len(hits) / 3
    assert final.read_bytes() == expected


@pytest.mark.parametrize("command", [("teacher-logits",), ("train-student", "--student", "hard")])
def test_a_job_that_is_preempted_with_its_loaders_workers_ends_well_and_goes_on(taught, command):
    views = 400 if command == ("teacher-logits",) else 8  # eight are there
    changes = "teacher_logits.workers=2", f"teacher_logits.views={views}", "student.workers=2", "student.epochs=400"
    Path("params.yaml").write_text(dump(loaded(*changes)))
    process = start(*command)
    while not Path("marks").exists() or not Path("marks").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "ended by SIGTERM" in said and "Traceback" not in said, said
    assert not list(Path("work/stores").glob("*.lock"))
