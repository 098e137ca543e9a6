"""`predict` and `export` take the best trained student unless they are given one, and say so."""

import json

import pytest

from pipeline.cli.models import _weights
from pipeline.common.errors import NotReady
from pipeline.config.params import resolve
from pipeline.config.paths import finetune_folder, student_folder

CONFIG = resolve(
    {"students": ["none", "hard"], "variants": {"none": {"distillation": "none"}, "hard": {}}, "finetune": {"from": "hard"}},
    (), "test",
)  # fmt: skip


def publish(folder, **metrics: float) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "weights.safetensors").write_bytes(b"")


def test_the_student_with_the_highest_top1_is_taken_and_named(in_tmp, capsys):
    publish(student_folder(CONFIG, "none"), val_top1_class=0.5)
    assert _weights(CONFIG, None).parent.name == "none"
    assert "student none: the only trained student, top-1 50.00%" in capsys.readouterr().err
    publish(student_folder(CONFIG, "hard"), val_top1_class=0.6, val_top1_mean=0.4)
    publish(finetune_folder(CONFIG, "hard"), val_top1_mean=0.45)
    assert _weights(CONFIG, None).parent.name == "none"
    said = capsys.readouterr()
    assert "student none: the best of 3 trained students" in said.err and not said.out


def test_the_named_student_is_taken_without_a_word(in_tmp, capsys):
    publish(student_folder(CONFIG, "hard"), val_top1_class=0.6)
    assert _weights(CONFIG, "hard").parent.name == "hard"
    assert capsys.readouterr().err == ""


def test_without_a_trained_student_there_is_nothing_to_take(in_tmp):
    with pytest.raises(NotReady, match="(?s)no student is trained yet.*--student teacher"):
        _weights(CONFIG, None)
