"""`pipeline status` of a teacher from pretrained weights and of its store, after its settings or its weights changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_class_map import mapped
from test_pretrained import BRIEF, transferred
from test_status import told
from test_training import CPU, loaded

from pipeline.config.paths import teacher_folder
from pipeline.models.weights import read_weights
from stages import teacher, teacher_logits, train_student

FOREIGN = "outdated"
FILE = "teacher.weights=source.safetensors"
TRANSFER = *BRIEF, FILE, "teacher.epochs=2"


@pytest.fixture
def pretrained(taught):
    """The folder with a published teacher whose weights were used as they are, and its store."""
    config = transferred(classes=3)
    teacher.run(config, CPU)
    teacher_logits.run(config, CPU)
    return config


def states(*overrides: str) -> list[str]:
    """Of the teacher and of its store."""
    rows = told(*overrides)
    return [rows[stage].state for stage in ("teacher", "teacher-logits")]


def replace_source(factor: float = 1.5) -> None:
    state = read_weights("source.safetensors")
    torch.save({name: tensor * factor for name, tensor in state.items()}, "other.pth")


def test_a_pretrained_teacher_and_its_store_are_done(pretrained):
    assert states(FILE) == ["done", "done"]


@pytest.mark.parametrize(
    "change",
    ["teacher.mean=[0.4, 0.4, 0.4]", "teacher.std=[0.2, 0.2, 0.2]", "teacher.kwargs.drop_rate=0.1", "teacher.class_map=[0, 1, 2]"],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_another_architecture_makes_teacher_and_store_another_configurations(pretrained, change, fresh):
    if fresh:
        shutil.rmtree("work")
    assert states(FILE, change) == [FOREIGN, FOREIGN]
    assert states(FILE) == ["done", "done"]


def test_another_class_map_makes_teacher_and_store_another_configurations(taught):
    teacher.run(mapped("[6, 0, 3]")[0], CPU)
    own = "teacher.weights=seven.safetensors", "teacher.class_map=[6, 0, 3]"
    teacher_logits.run(loaded(*own), CPU)
    assert states(*own) == ["done", "done"]
    assert states(own[0], "teacher.class_map=[6, 0, 2]") == [FOREIGN, FOREIGN]


def test_another_file_of_weights_makes_teacher_and_store_another_configurations(pretrained):
    replace_source()
    assert states("teacher.weights=other.pth") == [FOREIGN, FOREIGN]
    Path("other.pth").rename("source.pth")
    assert states("teacher.weights=source.pth") == [FOREIGN, FOREIGN]


def test_weights_replaced_under_the_same_name_are_another_teachers(pretrained):
    shutil.copy("outputs/small/teacher-finetune/weights.safetensors", "source.safetensors")
    assert states(FILE) == [FOREIGN, FOREIGN]


def test_weights_that_were_moved_or_are_gone_are_the_same_teachers(pretrained):
    Path("source.safetensors").rename("moved.safetensors")
    assert states("teacher.weights=moved.safetensors") == ["done", "done"]
    assert states(FILE) == ["done", "done"]


def test_a_teacher_published_before_its_origin_was_recorded_is_done(pretrained):
    path = teacher_folder(pretrained) / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({key: metrics[key] for key in metrics.keys() - {"architecture", "source"}}))
    assert states(FILE) == ["done", "done"]


def test_a_store_of_another_precision_is_of_another_configuration(pretrained):
    other = {"float32": "bfloat16", "bfloat16": "float32"}[pretrained.teacher_logits.precision]
    assert states(FILE, f"teacher_logits.precision={other}") == ["done", FOREIGN]


def test_distilled_students_of_a_store_of_another_teacher_are_outdated(taught):
    stages = "teacher-logits", "train-student@hard", "train-student@none"
    for name in ("hard", "none"):
        train_student.run(loaded(*BRIEF), CPU, name)
    shutil.rmtree(teacher_folder(taught))
    assert [told(*BRIEF)[stage].state for stage in stages] == ["done", "done", "done"]
    assert [told(*BRIEF, "teacher.seed=7")[stage].state for stage in stages] == [FOREIGN, FOREIGN, "done"]


def test_a_soft_student_of_another_kind_is_outdated_and_a_hard_one_is_not(taught):
    stages = "train-student@hard", "train-student@soft"
    for name in ("hard", "soft"):
        train_student.run(loaded(*BRIEF), CPU, name)
    assert [told(*BRIEF)[stage].state for stage in stages] == ["done", "done"]
    assert [told(*BRIEF, "teacher_logits.kind=dense8")[stage].state for stage in stages] == ["done", FOREIGN]


def test_a_teacher_reused_for_finetuning_is_the_published_one(pretrained):
    options = FILE, "teacher_finetune.epochs=0"
    assert told(*options)["teacher-finetune"].state == FOREIGN  # the trained one's
    teacher.run(loaded(*options), CPU, "finetune")
    assert told(*options)["teacher-finetune"].state == "done"
    replace_source()
    assert told("teacher.weights=other.pth", *options[1:])["teacher-finetune"].state == FOREIGN
    teacher.run(loaded("teacher.weights=other.pth", "teacher.min_top1=0"), CPU)
    row = told("teacher.weights=other.pth", *options[1:])
    assert (row["teacher"].state, row["teacher-finetune"].state) == ("done", FOREIGN)


def test_a_transferred_teacher_is_done_without_its_state_folder(taught):
    teacher.run(transferred(), CPU)
    row = told(*TRANSFER)["teacher"]
    assert (row.state, row.done) == ("done", row.total)
    shutil.rmtree("work")
    row = told(*TRANSFER)["teacher"]
    assert (row.state, row.done) == ("done", row.total) and row.total > 0


def test_a_teacher_transferred_from_other_weights_is_of_another_configuration(taught):
    teacher.run(transferred(), CPU)
    replace_source()
    assert told(*BRIEF, "teacher.weights=other.pth", "teacher.epochs=2")["teacher"].state == FOREIGN
    assert told(*TRANSFER, "teacher.lr=0.5")["teacher"].state == FOREIGN
