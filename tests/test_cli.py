"""The command line: what a mistake is told, its exit code, and that a dry run does nothing."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from conftest import picture, write_folders

from pipeline.cli.main import main
from pipeline.common.errors import unreadable

ROOT = Path(__file__).parent.parent
FOLDERS = ("--set", "data.source=folder", "--set", "data.train=train", "--set", "data.val=val")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project with the digits experiment's params.yaml and the configs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


def call(*arguments: str, code: int = 0) -> str:
    """What a command says; its exit code is `code` and there is no traceback."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


EXPERIMENTS = sorted(
    str(path.relative_to(ROOT / "configs").with_suffix(""))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "studies"
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configure_writes_a_whole_params_yaml_of_every_shipped_experiment(project, name):
    call("configure", name)
    assert yaml.safe_load((project / "params.yaml").read_text())["name"]


def test_configure_lays_overrides_on_the_experiment(project):
    call("configure", "digits", "student.lr=1e-3")
    assert yaml.safe_load((project / "params.yaml").read_text())["student"]["lr"] == 1e-3


def test_an_unknown_experiment_is_told_the_known_ones(project):
    assert "digits" in call("configure", "digit", code=2)


def test_every_shipped_experiment_is_listed_with_a_sentence(project):
    lines = call("configure", "--list").splitlines()
    assert [line.split()[0] for line in lines] == EXPERIMENTS
    for line in lines:
        sentence = line.split(maxsplit=1)[1]
        assert sentence.endswith(".") and "#" not in sentence, line


def test_configure_without_a_name_points_to_the_list(project):
    assert "pipeline configure --list" in call("configure", code=2)


def test_a_typo_in_a_key_is_told_the_full_name_and_the_nearest_key(project):
    said = call("prepare", "--set", "student.lrr=1", code=2)
    assert "student.lrr" in said and "did you mean lr?" in said


def test_a_missing_configuration_is_told_how_to_write_one(project):
    assert "pipeline configure" in call("prepare", "--config", "absent.yaml", code=2)


def test_a_device_that_is_not_there_is_refused(project):
    assert "--device" in call("teacher", "--device", "cuda:93", code=2)


@pytest.mark.parametrize("part", ["4", "4/4", "-1/2", "a/b"])
def test_a_part_that_is_none_is_refused(project, part):
    call("teacher-logits", "--part", part, code=2)


def test_a_stage_before_its_time_names_the_one_to_run(project):
    assert "run: pipeline prepare" in call("teacher", "--device", "cpu", code=1)


@pytest.mark.parametrize("command", [["prepare"], ["teacher", "--device", "cpu"]])
def test_a_dry_run_writes_nothing(project, command):
    call("prepare")
    before = files(project)
    assert call(*command, "--dry-run")
    assert files(project) == before


def test_distillation_options_need_a_student_to_change(project):
    assert "--student NAME" in call("train-student", "--distillation", "soft", "--device", "cpu", code=2)


def test_a_folder_without_classes(project):
    (project / "train").mkdir()
    (project / "val").mkdir()
    said = call("prepare", *FOLDERS, code=1)
    assert "no classes" in said and "train" in said


def test_an_empty_image_is_named_and_leaves_no_index(project):
    write_folders(project / "train", {"cat": 3, "dog": 3})
    write_folders(project / "val", {"cat": 1, "dog": 1})
    (project / "train/cat/000.png").write_bytes(b"")
    said = call("prepare", *FOLDERS, code=1)
    assert "cat/000" in said and "data.max_bad" in said
    assert not list(project.rglob("index.json"))


def test_a_class_that_training_lacks_is_named(project):
    write_folders(project / "train", {"cat": 2})
    write_folders(project / "val", {"cat": 1, "emu": 1})
    assert "emu" in call("prepare", *FOLDERS, code=1)


def test_an_image_that_cannot_be_decoded_is_named_with_the_reason(project):
    write_folders(project / "train", {"cat": 3, "dog": 3})
    write_folders(project / "val", {"cat": 1, "dog": 1})
    (project / "train/dog/001.jpg").write_bytes(picture(1, "jpg", 64, 64)[:200])
    said = call("prepare", *FOLDERS, code=1)
    assert "dog/001" in said and "truncated" in said.lower()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_imagenet_experiments_have_the_papers_values(project, size):
    call("configure", f"imagenet-deit-{size}")
    values = yaml.safe_load((project / "params.yaml").read_text())
    student, recipe = values["student"], values["recipe"]
    assert (student["epochs"], student["batch_size"], student["lr"], student["weight_decay"]) == (300, 1024, 5e-4, 0.05)
    assert (student["smoothing"], student["drop_path"], student["warmup_epochs"]) == (0.1, 0.1, 5)
    assert (recipe["auto_augment"], recipe["erase_prob"]) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (recipe["mixup_alpha"], recipe["cutmix_alpha"], recipe["repeats"], recipe["size"]) == (0.8, 1.0, 3, 224)
    assert values["teacher"]["weights"] == "regnety_160.deit_in1k"
    assert values["finetune"]["size"] == 384
    assert student["model"] == f"deit_{size}_distilled_patch16_224"


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_imagenet_experiments_are_compiled_and_the_convnet_lies_channels_last(project, size):
    call("configure", f"imagenet-deit-{size}")
    values = yaml.safe_load((project / "params.yaml").read_text())
    assert all(values[section]["compile"] for section in ("teacher_logits", "student", "finetune"))
    assert values["teacher_logits"]["channels_last"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_imagenet_experiments_dry_run_before_anything_is_computed(project, size):
    classes = [f"n{number:04d}" for number in range(1000)]  # as many as the teacher's weights are of
    write_folders(project / "train", dict.fromkeys(classes, 1))
    write_folders(project / "val", dict.fromkeys(classes, 1), seed=1000)
    call("configure", f"imagenet-deit-{size}", "data.train=train", "data.val=val", "data.workers=1")
    call("prepare")
    assert "timm" not in call("teacher", "--dry-run", "--device", "cpu")
    assert "at 224 px" in call("teacher-logits", "--dry-run", "--device", "cpu")
    assert "at 384 px" in call("teacher-logits", "--for", "finetune", "--dry-run", "--device", "cpu")
    said = call("train-student", "--dry-run", "--device", "cpu")
    assert "300 epochs" in said and "not yet" in said
    # as in the paper, which fine-tunes the largest alone
    tuned = "at 384 px, 30 epochs" if size == "base" else "nothing to fine-tune"
    assert tuned in call("finetune", "--dry-run", "--device", "cpu")
    assert f"evaluate {3 if size == 'base' else 2} models" in call("evaluate", "--dry-run", "--device", "cpu")


ALONE = ("--set", "students=[none]", "--set", "finetune.from=none")


def test_where_no_student_listens_a_teacher_and_a_store_are_marks_that_are_made_at_once(project):
    call("needed", *ALONE)
    assert json.loads((project / "outputs/digits/needed.json").read_text()) == {"train-student": False, "finetune": False}
    for purpose in ("train-student", "finetune"):
        # there is no data set yet: nothing is read
        assert "not needed" in call("teacher", "--for", purpose, "--if-needed", "--device", "cpu", *ALONE)
        assert "not needed" in call("teacher-logits", "--for", purpose, "--if-needed", "--device", "cpu", *ALONE)
    made = files(project / "outputs")
    for stage in ("teacher", "teacher-finetune"):
        assert {f"digits/{stage}/{name}" for name in ("weights.safetensors", "curve.csv", "metrics.json")} <= made
    for stage in ("teacher-logits", "teacher-logits-finetune"):
        assert {f"digits/{stage}/{name}" for name in ("manifest.json", "summary.json")} <= made


def test_what_is_needed_is_told_by_who_listens(project):
    call("needed", "--set", "students=[none, hard]", "--set", "finetune.from=none")
    assert json.loads((project / "outputs/digits/needed.json").read_text()) == {"train-student": True, "finetune": False}


def test_a_mark_is_no_teacher_and_no_store(project):
    call("prepare")
    for command in ("teacher", "teacher-logits"):
        call(command, "--if-needed", "--device", "cpu", *ALONE)
    said = call("teacher-logits", "--device", "cpu", code=1)
    assert "no configured student is distilled" in said and "run: pipeline teacher" in said
    said = call("train-student", "--student", "hard", "--device", "cpu", code=1)
    assert "no configured student is distilled" in said and "run: pipeline teacher-logits" in said


def test_status_names_no_teacher_that_is_not_needed_and_takes_no_mark_for_one(project):
    call("prepare")
    for command in ("teacher", "teacher-logits"):
        call(command, "--if-needed", "--device", "cpu", *ALONE)
    stages = [row["stage"] for row in json.loads(call("status", "--json", *ALONE))]
    assert stages == ["prepare", "train-student@none", "finetune@none", "evaluate"]
    rows = {row["stage"]: row["state"] for row in json.loads(call("status", "--json"))}
    assert rows["teacher"] == rows["teacher-logits"] == "not begun"


def test_killed_loader_worker_is_told_without_a_traceback(project, monkeypatch):
    from stages import prepare

    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(prepare, "run", killed)
    said = call("prepare", code=1)
    assert "out of memory" in said and "smaller `workers`" in said and "pid 7" in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), MemoryError("Unable to allocate 9.00 GiB"), torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0.\nOriginal Traceback:\nUnable to allocate 9 GiB"),
    ],
    ids=["bare", "numpy", "torch", "worker"],
)  # fmt: skip
def test_memory_that_runs_out_is_reported_in_one_message(project, monkeypatch, error):
    from stages import prepare

    monkeypatch.setattr(prepare, "run", lambda *_: (_ for _ in ()).throw(error))
    said = call("prepare", code=1)
    assert said.startswith("error: out of memory\n") and "fewer `workers`" in said
    assert "Traceback" not in said and str(error).rpartition("\n")[2] in said


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, os.strerror(errno.EMFILE), "shard.tar"), unreadable("shard.tar", OSError(errno.EMFILE, "Too many open files")),
     RuntimeError("Too many open files. Communication with the workers is no longer possible.")],
    ids=["system", "own", "torch"],
)  # fmt: skip
def test_too_many_open_files_are_reported_with_the_limit_that_is_needed(project, monkeypatch, error):
    from stages import prepare

    def fail(*_):
        raise error

    monkeypatch.setattr(prepare, "run", fail)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    said = call("prepare", code=1)
    assert "ulimit -n 1024" in said and "Too many open files" in said and "disk or server" not in said


def limited(arguments: str, limit: str) -> subprocess.CompletedProcess:
    command = f"ulimit {limit}; exec {sys.executable} -m pipeline {arguments}"
    return subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_loader_workers_that_need_more_open_files_than_are_allowed_are_refused(project):
    said = limited("teacher --device cpu --dry-run --set teacher.workers=4", "-n 64")
    assert said.returncode == 2 and "Traceback" not in said.stderr
    assert "at least 96 open files" in said.stderr and "fewer `workers`" in said.stderr


def test_the_limit_of_open_files_is_raised_where_the_system_allows_it(project):
    said = limited("teacher --device cpu --dry-run --set teacher.workers=4", "-Sn 64")
    assert said.returncode == 0 and "not yet" in said.stdout, said.stderr


STAGES = ("teacher", "teacher-logits", "train-student", "finetune", "evaluate")


@pytest.mark.parametrize("command", STAGES)
def test_a_dry_run_before_prepare_says_what_is_not_yet_there(project, command):
    said = call(command, "--dry-run", "--device", "cpu")
    assert "not yet" in said and "run: pipeline prepare" in said


FORESEEN = {
    "missing weights": ("teacher", "teacher.weights=absent.safetensors", "absent.safetensors"),
    "no such tag": ("teacher", "teacher.weights=regnety_160.nobody", "no such weights in timm"),
    "no such teacher": ("teacher", "teacher.model=regnety_999", "regnety_9"),
    "its arguments": ("teacher-logits", "teacher.kwargs.depht=3", "depht"),
    "no such student": ("train-student", "student.model=deit_huge", "deit_huge"),
    "a student's arguments": ("train-student", "variants.hard.kwargs.num_heads=7", "num_heads"),
    "missing start": ("finetune", "finetune.weights=absent.pth", "absent.pth"),
    "any of them": ("evaluate", "student.model=deit_huge", "deit_huge"),
}


@pytest.mark.parametrize(("command", "override", "told"), FORESEEN.values(), ids=list(FORESEEN))
def test_a_dry_run_refuses_what_would_fail_later(project, command, override, told):
    result = CliRunner().invoke(main, [command, "--dry-run", "--device", "cpu", "--set", override])
    assert result.exit_code in (1, 2) and told in result.output and "Traceback" not in result.output


def test_a_dry_run_says_whether_a_teachers_weights_are_used_as_they_are(project):
    call("prepare")  # ten classes
    common = ["--dry-run", "--device", "cpu", "--set", "teacher.model=test_resnet", "--set", "teacher.kwargs={}", "--set"]
    for classes in (7, 10):
        torch.save(timm.create_model("test_resnet", num_classes=classes).state_dict(), f"{classes}.pth")
    replaced = "a different number of classes from the index (10): its classifier is replaced"
    said = call("teacher", *common, "teacher.weights=7.pth", "--set", "teacher.head_epochs=2")
    assert replaced in said and "for 26 epochs, the first 2 of the classifier alone" in said and "work/state/" in said
    said = call("teacher", *common, "teacher.weights=10.pth")
    assert replaced not in said and "10.pth, 32 px" in said
    assert replaced in call("teacher", *common, "teacher.weights=test_resnet.r160_in1k")  # without a download


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_teachers_weights_of_another_model_are_refused(project, dry):
    call("prepare")
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), "vit.pth")
    said = call("teacher", "--device", "cpu", *dry, "--set", "teacher.weights=vit.pth", code=1)
    assert "weights of another model" in said


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_soft_distillation_from_a_store_of_classes_alone_is_refused_before_anything(project, dry):
    soft = ["--student", "hard", "--distillation", "soft", "--set", "teacher_logits.kind=argmax", "--set"]
    said = call("train-student", "--device", "cpu", *dry, *soft, "students=[none, hard, token]", code=2)
    assert "teacher_logits.kind topk" in said and "found:    argmax" in said


def test_a_model_or_a_size_needs_the_weights_that_are_evaluated(project):
    assert "--weights FILE" in call("evaluate", "--model", "deit_tiny_patch16_224", "--device", "cpu", code=2)


def test_ctrl_c_ends_a_command_in_one_line(project, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.prepare.run", interrupted)
    assert call("prepare", code=130).strip() == "interrupted; run the same command again: it resumes, or starts over"


@pytest.mark.parametrize("group", [(), ("store",)])
def test_help_lists_commands_with_a_whole_sentence(group):
    listed = call(*group, "--help").partition("Commands:")[2]
    assert listed and "..." not in listed
