"""`pipeline doctor`: each check finds what it looks for, and only what will fail gives exit code 1."""

import errno
import importlib.metadata
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import small_config, write_folders

from pipeline.cli import doctor, machine
from pipeline.cli.machine import Finding, Level
from pipeline.cli.main import main
from pipeline.config.params import resolve
from pipeline.config.paths import NOT_NEEDED

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The digits experiment in an empty project, on a machine without a GPU, with a fast disk."""
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, name)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "measure_disk", lambda folder: machine.DiskSpeed(1e9, 1e9))
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    return tmp_path


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def levels(said: str) -> dict[str, str]:
    """The first word of each line by its check."""
    names = ("versions", "GPU", "JPEG", "cores", "DVC", "precision", "free space", "disk", "shared memory", "open files",
             "configuration", "requirements", "weights")  # fmt: skip
    rows = [line.partition(" ") for line in said.splitlines()]
    return {name: first for first, _, rest in rows for name in names if rest.lstrip().startswith(f"{name} ")}


def test_it_has_a_line_per_check_and_changes_nothing(project):
    before = sorted(project.rglob("*"))
    found = levels(call())
    assert sorted(project.rglob("*")) == before
    assert found.keys() >= {"versions", "GPU", "JPEG", "cores", "DVC", "precision", "free space", "disk",
                            "shared memory", "open files"}  # fmt: skip
    assert found["free space"] == found["disk"] == found["JPEG"] == "ok"


def test_a_warning_alone_is_no_failure(project):
    said = call("--set", "student.precision=bfloat16")
    assert levels(said)["precision"] == "warning" and "student.precision" in said


def test_weights_that_cannot_be_had_will_fail_unless_the_model_is_published(project, monkeypatch):
    monkeypatch.setattr(doctor, "missing_weights", lambda tag: "the hub cannot be reached" * (tag == "test_resnet.r160_in1k"))
    change = "--set", "teacher.weights=test_resnet.r160_in1k", "--set", "student.weights=deit_tiny_patch16_224.fb_in1k"
    said = call(*change, code=1)
    assert levels(said)["weights"] == "fail" and "test_resnet.r160_in1k: the hub cannot be reached" in said
    folder = project / "outputs/digits/teacher"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(NOT_NEEDED))
    assert levels(call(*change, code=1))["weights"] == "fail"
    (folder / "metrics.json").write_text('{"top1": 0.9}')
    said = call(*change)
    assert levels(said)["weights"] == "ok" and "deit_tiny_patch16_224.fb_in1k: in the local cache" in said
    assert "none to download" in call()
    (folder / "metrics.json").unlink()
    assert levels(call(*change, "--set", "students=[none]", "--set", "finetune.from=[]"))["weights"] == "ok"  # needs no teacher


def test_what_will_fail_is_named_and_gives_exit_code_1(project):
    (project / ".dvc/config").unlink()
    said = call(code=1)
    assert levels(said)["DVC"] == "fail" and "1 of these will fail: DVC" in said


def test_a_configuration_that_is_invalid_is_one_of_the_findings(project):
    (project / "params.yaml").write_text("name: 3\n")
    assert levels(call(code=1))["configuration"] == "fail"


def test_a_full_disk_is_found(project, monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 1000)
    assert levels(call(code=1))["free space"] == "fail"


def test_space_is_counted_from_the_files_before_there_is_an_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_folders(tmp_path / split, {"cat": 3, "dog": 3})
    files = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    config = small_config(tmp_path)
    needed = doctor.needed_bytes(config)
    assert files < needed < files + 100_000
    assert doctor.needed_bytes(small_config(tmp_path, teacher_logits__kind="dense")) > needed
    without = small_config(tmp_path, student__distillation="none")
    assert doctor.needed_bytes(without) == files


def test_data_that_is_not_there_yet_is_a_warning(project):
    said = call("--set", "data.source=folder", "--set", "data.train=absent", "--set", "data.val=absent")
    assert levels(said)["free space"] == "warning"


@pytest.mark.parametrize(("speed", "level"), [(40e6, Level.WARN), (60e6, Level.OK)])
def test_a_slow_disk_is_warned_of(tmp_path, monkeypatch, speed, level):
    monkeypatch.setattr(doctor, "measure_disk", lambda folder: machine.DiskSpeed(1e9, speed))
    assert doctor.check_disk(tmp_path / "not/yet/there").level is level


def test_measuring_a_disk_leaves_nothing(tmp_path):
    speed = machine.measure_disk(tmp_path, size=100_000, seconds=10)
    assert speed.read > 0 and speed.write > 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_will_fail(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)
    assert doctor.check_disk(tmp_path).level is Level.FAIL


@pytest.mark.parametrize(
    ("workers", "free", "level"), [(4, 2**20, Level.FAIL), (4, 2**34, Level.OK), (0, 0, Level.OK)]
)
def test_shared_memory_must_hold_the_buffers_of_loader_workers(monkeypatch, tmp_path, workers, free, level):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: free)
    values = {section: {"workers": workers} for section in ("teacher", "student", "evaluate", "teacher_logits")}
    assert doctor.check_shared_memory(resolve(values, (), "test"), False, tmp_path).level is level


@pytest.mark.parametrize(("hard", "level"), [(64, Level.FAIL), (4096, Level.OK), (resource.RLIM_INFINITY, Level.OK)])
def test_the_limit_of_open_files_must_allow_the_workers(monkeypatch, hard, level):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, hard))
    config = resolve({"student": {"workers": 4}}, (), "test")
    assert doctor.check_open_files(config, False).level is level


def test_versions_that_are_not_met_are_named():
    assert machine.unmet(["torch>=1", "numpy; extra == 'dev'"]) == []
    assert machine.unmet(["torch<1"]) == [f"torch<1, found {importlib.metadata.version('torch')}"]
    assert machine.unmet(["no-such-library>=1"]) == ["no-such-library>=1, found none"]


def test_decoders_that_differ_will_fail(monkeypatch):
    assert machine.same_pixels(machine.example_jpeg())
    monkeypatch.setattr(machine, "decode_trusted", lambda data: machine.decode(data) ^ 1)
    assert [found.level for found in machine.check_decoders() if found.name == "JPEG"] == [Level.FAIL]


@pytest.mark.parametrize(
    ("quota", "level"), [("max 100000", Level.OK), ("50000 100000", Level.WARN), ("1000000000 100000", Level.OK)]
)
def test_a_quota_below_the_visible_cores_is_warned_of(tmp_path, quota, level):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.check_cores(tmp_path / "cpu.max", load=0.0).level is level


def test_a_machine_without_cgroups_has_no_quota(tmp_path):
    assert machine.check_cores(tmp_path / "absent", load=0.0).level is Level.OK


def test_a_load_above_the_number_of_cores_is_warned_of(tmp_path):
    assert machine.check_cores(tmp_path / "absent", load=1e6).level is Level.WARN


class _Gpu:
    def __init__(self, major: int):
        self.name, self.major = "Some GPU", major


@pytest.mark.parametrize(("major", "free", "level"), [(8, 1.0, Level.OK), (7, 1.0, Level.OK), (9, 0.2, Level.WARN)])
def test_gpus_that_are_in_use_are_warned_of(monkeypatch, major, free, level):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: _Gpu(major))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (int(free * 2**34), 2**34))
    (found,) = machine.check_gpus()
    assert isinstance(found, Finding) and found.level is level


@pytest.mark.parametrize(
    ("major", "precision", "level", "said"),
    [
        (9, "bfloat16", Level.OK, "bfloat16 suits this GPU"),
        (9, "float16", Level.OK, "bfloat16 suits this GPU"),
        (7, "bfloat16", Level.WARN, "teacher.precision bfloat16, .*student.precision bfloat16: may be slower than float16"),
        (7, "float16", Level.OK, "float16 suits this GPU"),
        (6, "float16", Level.WARN, "may be slower than float32 on this GPU"),
        (None, "float16", Level.WARN, "may be slower than float32 on a CPU"),
        (None, "float32", Level.OK, "float32 suits a CPU"),
    ],
)
def test_a_precision_that_the_device_does_not_have_is_warned_of(monkeypatch, major, precision, level, said):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _Gpu(major))
    values = {section: {"precision": precision} for section in ("teacher", "teacher_logits", "student")}
    device = torch.device("cuda", 0) if major else torch.device("cpu")
    found = doctor.check_precision(resolve(values, (), "test"), device)
    assert found.level is level and re.search(said, found.text)


@pytest.mark.parametrize(("missing", "level"), [(".git", Level.WARN), ("dvc.yaml", Level.FAIL), ("", Level.OK)])
def test_dvc_needs_its_files_and_git(project, missing, level):
    if missing == ".git":
        (project / ".git").rmdir()
    elif missing:
        (project / missing).unlink()
    assert machine.check_dvc(project).level is level


def test_dvc_must_be_on_the_path(project, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.check_dvc(project).level is Level.FAIL
