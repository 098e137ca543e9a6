"""A run's results: its weights once, and metrics of what the configuration names now."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_folders
from test_training import CPU, loaded, newest_checkpoint

from pipeline.common.distributed import Rank
from pipeline.common.errors import PipelineError
from pipeline.common.lock import is_held
from pipeline.config.paths import RUN_LOCK, index_path, student_folder, teacher_folder
from pipeline.config.schema import Config
from pipeline.models.build import build_student
from pipeline.models.evaluation import predict, top_k_accuracy
from pipeline.models.weights import load_weights, read_saved_weights, read_weights
from pipeline.shards.index import Index
from pipeline.training import completion
from pipeline.training.completion import check_same_run, exclusive
from pipeline.training.log import read_curve
from pipeline.training.trainer import Trainer
from stages import prepare, train_student


@pytest.fixture
def trained(taught) -> Config:
    """With a student that was trained; whatever trains again fails."""
    config = loaded("student.eval_epochs=1")
    train_student.run(config, CPU, "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained again"))
        yield config


def published(config: Config) -> dict:
    return json.loads((student_folder(config, "none") / "metrics.json").read_text())


def measured(config: Config) -> float:
    """Top-1 of the published weights on the validation set, as the configuration has it."""
    val = Index(index_path(config, "val"))
    model = build_student(config.student_named("none"), config.recipe, 3, config.recipe.size)
    load_weights(model.model, read_weights(student_folder(config, "none") / "weights.safetensors"), "published")
    logits = predict(model, val, config.recipe.size, config.evaluate.crop, 8, 0, CPU)
    return top_k_accuracy(logits[0], torch.from_numpy(val.labels()), 1)


@pytest.mark.parametrize("model", ["none", "teacher"])
def test_model_json_is_the_description_in_the_weights(trained, model):
    folder = teacher_folder(trained) if model == "teacher" else student_folder(trained, model)
    metadata = read_saved_weights(folder / "weights.safetensors")[1]
    written, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("model", "metrics"))
    assert written == metadata["description"] | {"run": metrics["run"]}
    assert written["classes"] == ["cat", "dog", "eel"] and written["size"] == 16


def test_another_validation_set_gives_other_metrics_of_the_same_weights(trained):
    weights, before = student_folder(trained, "none") / "weights.safetensors", published(trained)
    assert before["val_top1_class"] == measured(trained)
    write_folders(Path("others"), {"cat": 1, "dog": 5, "eel": 7}, seed=2)
    changed, expected = loaded("student.eval_epochs=1", f"data.val={Path('others').absolute()}"), weights.read_bytes()
    prepare.run(changed)
    train_student.run(changed, CPU, "none")
    assert published(changed)["val_top1_class"] == measured(changed) != before["val_top1_class"]
    assert {key: published(changed)[key] for key in ("epoch", "loss", "lr", "run")} == {
        key: before[key] for key in ("epoch", "loss", "lr", "run")
    }
    assert weights.read_bytes() == expected


def test_another_crop_gives_other_metrics(trained):
    changed, before = loaded("student.eval_epochs=1", "evaluate.crop=0.6"), published(trained)
    train_student.run(changed, CPU, "none")
    assert published(changed)["val_top1_class"] == measured(changed)
    assert published(changed)["validation"] != before["validation"]


def test_a_curve_does_not_mix_validation_sets(trained):
    curve = student_folder(trained, "none") / "curve.csv"
    assert all(row["val_top1_class"] for row in read_curve(curve))
    changed = loaded("student.eval_epochs=1", "evaluate.crop=0.6")
    train_student.run(changed, CPU, "none")
    assert [row["val_top1_class"] for row in read_curve(curve)] == [""] * 6 + [str(measured(changed))]


def test_going_back_to_the_first_validation_set_gives_the_first_metrics(trained):
    before = (student_folder(trained, "none") / "metrics.json").read_bytes()
    train_student.run(loaded("student.eval_epochs=1", "evaluate.crop=0.6"), CPU, "none")
    train_student.run(trained, CPU, "none")
    assert (student_folder(trained, "none") / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("lost", ["log.jsonl", "final.safetensors"])
def test_metrics_are_the_last_epochs_whatever_a_crash_took(trained, lost):
    """The log's end, or the run's end between its last checkpoint and its final weights."""
    metrics, path = published(trained), newest_checkpoint().parent / lost
    if lost == "log.jsonl":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    else:
        path.unlink()
    train_student.run(trained, CPU, "none")
    assert published(trained) == metrics


def test_metrics_name_the_run_that_they_are_of(trained):
    teachers = json.loads((teacher_folder(trained) / "metrics.json").read_text())
    assert {published(trained)["run"], teachers["run"]} == {state.name for state in Path("work/state").iterdir()}


# ranks


class Run:
    """What of a run these functions ask."""

    name, identity = "one", {"seed": 1}

    def __init__(self, folder: Path):
        self.folder = folder


def test_a_rank_that_sees_another_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Rank, "broadcast_object", lambda *_: "f" * 32)
    with pytest.raises(PipelineError, match=r"rank 1 of 2(?s:.)*rank 0's run, f{32}"):
        check_same_run(Run(tmp_path), Rank(1, 2))


def test_who_waits_for_another_job_exchanges_often_and_briefly(tmp_path, monkeypatch):
    """In one exchange that lasts, nccl would give up after ten minutes."""
    told, locked = [], iter([False, False, True])
    monkeypatch.setattr(completion, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(completion, "_locked", lambda *_: next(locked))
    monkeypatch.setattr(Rank, "broadcast_object", lambda _, value: told.append(value) or value)
    with exclusive(Run(tmp_path), Rank()):
        pass
    assert told == [False, False, True]


def test_other_ranks_wait_with_rank_0_and_take_no_lock(tmp_path, monkeypatch):
    told = iter([False, True])
    monkeypatch.setattr(completion, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(Rank, "broadcast_object", lambda *_: next(told))
    with exclusive(Run(tmp_path), Rank(1, 2)):
        assert not is_held(tmp_path / RUN_LOCK)
    assert next(told, None) is None
