"""The benchmarks of whole steps, and of the store at scale, run small and print every row."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
pytestmark = pytest.mark.slow


def report(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, BENCH / script, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str) -> dict[str, list[float]]:
    """Of all tables: what a row is called, and the first number of each cell that has one."""
    found = {}
    for line in text.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        numbers = [re.match(r"-?[\d,]+(\.\d+)?(e-?\d+)?", cell) for cell in cells]
        if line.startswith("| ") and any(numbers):
            found[name.strip("| ")] = [float(number[0].replace(",", "")) for number in numbers if number]
    return found


def parts(text: str) -> dict[str, dict[str, list[float]]]:
    """The rows below each heading."""
    sections = text.split("\n## ")[1:]
    return {section.splitlines()[0]: rows(section) for section in sections}


STEPS = ("step without distillation", "step with the store")


def test_online_tells_every_way_and_goal():
    text = report("online.py", "--tiny")
    found = rows(text)
    for name in (*(f"{step}, ms" for step in STEPS), "step with the teacher online, ms",
                 "the teacher's forward alone, ms", "online / stored", "bound: 1 + forward / without",
                 "torch's own linear layers / ours",
                 "online / stored, of that bound", "FLOP bound: 1 + T / (3 S)", "`read_predictions` alone, us a step",
                 "`read_predictions` in place, us a step", "the mean of these, % of the step without"):  # fmt: skip
        assert len(found[name]) == 2 and min(found[name]) > 0, name
    assert max(found["online / stored, of that bound"]) < 5
    assert min(found["bound: 1 + forward / without"] + found["FLOP bound: 1 + T / (3 S)"]) > 1
    assert min(found["`read_predictions` in place, us a step"]) < 1e3 * min(found["step with the store, ms"])
    for student in ("tiny", "small"):
        assert found[f"{student}: online / stored"][-1] > 0
        assert found[f"{student}: `read_predictions`, % of the step"][-1] > 0


@pytest.fixture(scope="module")
def gpu() -> str:
    return report("gpu.py", "--tiny")


def test_gpu_fails_and_leaves_out_no_part(gpu):
    assert list(parts(gpu)) == ["teacher", "bits", "repeats", "loader", "tiny@32", "small@48"]
    assert "failed" not in gpu and "left out" not in gpu


def test_gpu_tells_the_teachers_speed_beside_its_forward(gpu):
    found = parts(gpu)["teacher"]
    workers = max(1, os.cpu_count() - 1)
    names = ("UnitWorker, groups rendered before", f"UnitWorker, loader of {workers} workers", "that loader alone")
    assert all(min(found[name][:2]) > 0 for name in names)
    assert found["forward alone, pictures on the device"][0] > 0
    assert "limits" in gpu and found["UnitWorker / forward, real loader"][-1] > 0


def test_gpu_trains_to_the_same_bits_again(gpu):
    told = [line.split(" | ") for line in gpu.splitlines() if line.startswith(("| student: ", "| teacher: "))]
    assert [cells[1] for cells in told] == ["no", "yes"] * 2
    for _, _, weights, other, largest, milliseconds in told:  # on a CPU always
        assert int(weights.replace(",", "")) > 10_000 and (other, largest) == ("0", "0")
        assert float(milliseconds.strip(" |")) > 0


def test_gpu_finds_a_units_logits_again(gpu):
    found = parts(gpu)["bits"]
    assert found["the same again"] == [0, 0, 0]
    assert found["loader, workers: 1"] == found["loader, workers: 2"] == [0, 0, 0]


@pytest.mark.parametrize("case", ["tiny@32", "small@48"])
def test_gpu_tells_a_students_steps_and_bounds(gpu, case):
    found = parts(gpu)[case]
    for name in (*STEPS, "step, teacher online"):
        fed, resident, views, flops, waits, host, _ = found[name]
        assert min(fed, resident, views, flops, host) > 0 and 0 <= waits <= 100
    assert found["the teacher's forward alone"][0] > 0
    assert found["bound: 1 + forward / without"][0] > 1 and found["FLOP bound: 1 + T / (3 S)"][0] > 1
    for feed in ("host", "device"):
        assert 0.05 < found[f"stored / without, groups on the {feed}"][0] < 20
        assert found[f"online / stored, groups on the {feed}"][0] > 0
    assert found["online / stored, of that bound"][0] > 0


def test_gpu_tells_how_long_the_loader_is_waited_for(gpu):
    found = parts(gpu)["loader"]
    assert found["step with the store, ms"][0] > 0 and found["views/s"][0] > 0
    assert 1 <= found["views a decoding"][0] <= 3
    assert 0 <= found["of the time, waiting for the loader, %"][0] <= 100


def test_gpu_names_the_parts_when_one_is_unknown():
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", "--tiny", "--only", "bits,teachers"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--only: teachers; there are teacher, bits" in done.stderr


def test_scale_writes_and_reads_a_small_store():
    options = ("--rows", "500", "--shards", "2", "--views", "30", "--reads", "20", "--rounds", "1")
    found = rows(report("scale.py", *options))
    assert found["files, without the arrays' metadata"] == [4, 4]
