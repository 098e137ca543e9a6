"""Training in float16: the loss is scaled, steps that overflow are skipped, and a run that only overflows stops."""

import functools
import json
from pathlib import Path

import pytest
import torch
from test_training import (
    CPU,
    Stop,
    loaded,
    newest_checkpoint,
    trained_losses,
)
from torch.amp.grad_scaler import GradScaler

from pipeline.common.errors import PipelineError
from pipeline.config.paths import student_folder
from pipeline.models.weights import read_weights
from pipeline.training import scaling
from pipeline.training.log import read_log
from pipeline.training.trainer import Trainer
from stages import teacher_logits, train_student

HALF = "student.precision=float16", "student.epochs=3", "student.eval_epochs=3"


@pytest.fixture
def overflowing(monkeypatch):
    """A first loss scale at which gradients overflow, and that doubles after three steps without."""
    monkeypatch.setattr(scaling, "GradScaler", functools.partial(GradScaler, init_scale=2.0**22, growth_interval=3))


def steps() -> list[dict]:
    return [line for line in read_log(newest_checkpoint().parent / "log.jsonl") if line["kind"] == "step"]


def weights(config) -> dict[str, torch.Tensor]:
    return read_weights(student_folder(config, "hard") / "weights.safetensors")


def test_a_step_in_float16_is_one_in_float32_up_to_rounding(taught):
    exact = trained_losses(loaded("student.epochs=3"), "hard", "stored")
    assert trained_losses(loaded(*HALF), "hard", "stored") == pytest.approx(exact, rel=2e-2)
    assert {line["loss_scale"] for line in steps()} == {65536} and steps()[-1]["skipped_steps"] == 0


def test_the_gradient_is_unscaled_before_it_is_clipped_and_logged(taught):
    trained_losses(loaded(*HALF, "student.precision=float32", "student.clip_grad=0.5"), "hard", "stored")
    exact = [line["grad_norm"] for line in steps()]
    clipped = trained_losses(loaded(*HALF, "student.clip_grad=0.5"), "hard", "stored")
    assert [line["grad_norm"] for line in steps()] == pytest.approx(exact, rel=5e-2)
    assert clipped != trained_losses(loaded(*HALF), "hard", "stored")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_that_overflows_changes_neither_weights_nor_the_optimizers_state(taught, overflowing, monkeypatch, optimizer):
    seen, real = [], Trainer.train_step

    def watched(self, batches):
        before = {key: value.clone() for key, value in self.run.model.state_dict().items()}
        real_values = real(self, batches)
        same = all(torch.equal(before[key], value) for key, value in self.run.model.state_dict().items())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        seen.append((bool(real_values[-1]), same, all(not value.any() for value in states)))
        return real_values

    monkeypatch.setattr(Trainer, "train_step", watched)
    train_student.run(loaded(*HALF, f"student.optimizer={optimizer}"), CPU, "hard")
    count = steps()[-1]["skipped_steps"]
    assert seen[0] == (True, True, True) and 0 < count < len(seen)
    assert sum(skipped for skipped, *_ in seen) == count and all(same is skipped for skipped, same, _ in seen)
    assert ["grad_norm" in line for line in steps()] == [not skipped for skipped, *_ in seen]


@pytest.mark.parametrize("at", [2, 7])
def test_a_run_that_stops_and_is_resumed_ends_with_the_same_weights_and_scales(taught, overflowing, monkeypatch, at):
    config, real = loaded(*HALF), Trainer.train_step
    train_student.run(config, CPU, "hard")
    expected = weights(config), [(line["loss"], line["loss_scale"], line["skipped_steps"]) for line in steps()]
    assert len({scale for _, scale, _ in expected[1]}) > 2
    for path in newest_checkpoint().parent.iterdir():
        path.unlink()

    def stopping(self, batches):
        if self.step == at:
            raise Stop
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "train_step", stopping)
        train_student.run(config, CPU, "hard")
    train_student.run(config, CPU, "hard")
    assert [(line["loss"], line["loss_scale"], line["skipped_steps"]) for line in steps()] == expected[1]
    assert all(torch.equal(value, weights(config)[key]) for key, value in expected[0].items())


def test_a_run_that_only_overflows_stops_and_keeps_its_last_checkpoint(taught, monkeypatch):
    real = scaling.LossScaler.unscale
    monkeypatch.setattr(scaling, "GradScaler", functools.partial(GradScaler, init_scale=4.0))

    def overflow(self, optimizer):
        next(parameter for parameter in optimizer.param_groups[0]["params"] if parameter.grad is not None).grad[0] = torch.inf
        real(self, optimizer)

    monkeypatch.setattr(scaling.LossScaler, "unscale", overflow)
    with pytest.raises(PipelineError, match=r"(?s)step 2.*loss scale of 1.*overflow at 1; 3 of 3 steps.*bfloat16 or float32"):
        train_student.run(loaded(*HALF), CPU, "hard")
    assert newest_checkpoint().name == "step-000000002.ckpt"


def test_a_loss_that_is_not_finite_stops_a_run_in_float16_too(taught, monkeypatch):
    real = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: real(self, batch) * (torch.nan if self.step == 1 else 1))
    with pytest.raises(PipelineError, match=r"(?s)step 1.*finite loss.*loss nan"):
        train_student.run(loaded(*HALF), CPU, "hard")


def test_a_store_is_computed_in_float16(taught):
    config = loaded("teacher_logits.precision=float16", "work=half")
    teacher_logits.run(config, CPU)
    store = next(Path("half/stores").glob("*.zarr"))
    assert json.loads((store / "zarr.json").read_text())["attributes"]["precision"] == "float16"
