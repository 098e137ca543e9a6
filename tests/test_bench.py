"""Every benchmark runs in a small form and prints every row."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    """The rows of all tables: a row's title to the first number of each cell that has one."""
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


def test_online_reports_every_way_and_goal():
    text = report("online.py", "--tiny")
    found = rows(text)
    for name in (*(f"{step}, ms" for step in STEPS), "step with the teacher online, ms",
                 "the teacher's forward alone, ms", "online / stored", "bound: 1 + forward / without",
                 "torch's own linear layers / ours",
                 "online / stored, of that bound", "FLOP bound: 1 + T / (3 S)",
                 "`read_predictions`, us per step", "`read_predictions`, mean, % of the step without"):  # fmt: skip
        assert len(found[name]) == 2 and min(found[name]) > 0, name
    assert max(found["online / stored, of that bound"]) < 5
    assert min(found["bound: 1 + forward / without"] + found["FLOP bound: 1 + T / (3 S)"]) > 1
    assert min(found["`read_predictions`, us per step"]) < 1e3 * min(found["step with the store, ms"])
    for student in ("tiny", "small"):
        assert found[f"{student}: online / stored"][-1] > 0
        assert found[f"{student}: `read_predictions`, % of the step"][-1] > 0


@pytest.fixture(scope="module")
def gpu() -> str:
    return report("gpu.py", "--tiny")


def test_gpu_runs_every_part(gpu):
    assert list(parts(gpu)) == ["teacher", "bits", "repeats", "loader", "tiny@32", "small@48"]
    assert "failed" not in gpu and "left out" not in gpu


def test_gpu_reports_the_speed_of_labelling_against_the_forward(gpu):
    found = parts(gpu)["teacher"]
    workers = max(1, os.cpu_count() - 1)
    names = ("UnitWorker, groups rendered before", f"UnitWorker, loader of {workers} workers", "that loader alone")
    assert all(min(found[name][:2]) > 0 for name in names)
    assert found["forward alone, pictures on the device"][0] > 0
    assert "limits" in gpu and found["UnitWorker / forward, real loader"][-1] > 0


def test_gpu_trains_to_the_same_bits_again(gpu):
    repeated = [line.split(" | ") for line in gpu.splitlines() if line.startswith(("| student: ", "| teacher: "))]
    assert [cells[1] for cells in repeated] == ["no", "yes"] * 2
    for _, _, weights, other, largest, milliseconds in repeated:  # on a CPU always
        assert int(weights.replace(",", "")) > 10_000 and (other, largest) == ("0", "0")
        assert float(milliseconds.strip(" |")) > 0


def test_gpu_computes_a_units_logits_again_to_the_bit(gpu):
    found = parts(gpu)["bits"]
    assert found["the same again"] == [0, 0, 0]
    assert found["loader, workers: 1"] == found["loader, workers: 2"] == [0, 0, 0]


@pytest.mark.parametrize("case", ["tiny@32", "small@48"])
def test_gpu_reports_a_students_steps_and_bounds(gpu, case):
    found = parts(gpu)[case]
    for name in (*STEPS, "step with the teacher online"):
        fed, resident, views, flops, waits, host, _ = found[name]
        assert min(fed, resident, views, flops, host) > 0 and 0 <= waits <= 100
    assert found["the teacher's forward alone"][0] > 0
    assert found["bound: 1 + forward / without"][0] > 1 and found["FLOP bound: 1 + T / (3 S)"][0] > 1
    for feed in ("host", "device"):
        assert 0.05 < found[f"stored / without, batches on the {feed}"][0] < 20
        assert found[f"online / stored, batches on the {feed}"][0] > 0
    assert found["online / stored, of that bound"][0] > 0


def test_gpu_reports_the_wait_for_the_loader(gpu):
    found = parts(gpu)["loader"]
    assert found["step with the store, ms"][0] > 0 and found["views/s"][0] > 0
    assert 1 <= found["views per decode"][0] <= 3
    assert 0 <= found["time spent waiting for the loader, %"][0] <= 100


def test_gpu_names_the_parts_when_one_is_unknown():
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", "--tiny", "--only", "bits,teachers"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--only: teachers; there are teacher, bits" in done.stderr


@pytest.mark.campaign
def test_scale_writes_and_reads_a_small_store():
    found = rows(report("scale.py", "--rows", "500", "--shards", "2", "--views", "30", "--rounds", "1"))
    assert found["files, without the arrays' metadata"] == [4, 4]
    assert min(found["train"]) > 0 and min(found["manifest"]) > 0


def test_store_reports_every_kind_and_layout():
    text = report("store.py", "--rounds", "1", "--write-rounds", "1", "--narrow-block", "3")
    kinds = parts(text)
    assert [heading.split(",")[0] for heading in kinds] == ["argmax", "topk", "dense", "dense8"]
    for found in kinds.values():
        assert len(found["training order, us per sample"]) == 3 and min(found["training order, us per sample"]) > 0
    assert kinds["argmax, units of 1,000 rows x 3 views: 0.15 million rows"]["bytes per row, all files"] == [2.204, 2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        picture.save(folder / f"{number}.jpg")
    return folder


def test_views_reports_every_way(photos):
    found = rows(report("views.py", str(photos), "--rounds", "1"))
    assert len(found) == 6 and all(min(values) > 0 for values in found.values())
    assert found["timm, uint8"][1] == 1


@pytest.mark.campaign
def test_loader_reports_every_slice(photos):
    found = rows(report("loader.py", str(photos), "--rounds", "1"))
    assert list(found)[1:] == ["1", "2", "4", "16"]  # below the title
    assert all(min(values) > 0 for values in found.values())


def test_remote_reports_every_way():
    found = rows(report("remote.py", "--rounds", "1", "--latency", "0", "--bandwidth", "1000"))
    requests = {name: values[2] for name, values in found.items() if "," in name and "images" not in name}
    assert requests == {
        "copies, cold": 12, "copies, warm": 0, "ranges, one by one": 3072, "ranges, 16 at a time": 3072,
    }  # fmt: skip
    assert found["webdataset"][1:3] == [1, 12]
