"""Activation checkpointing: less memory, the same bits, and a refusal where that would not be so."""

import shutil
from pathlib import Path

import pytest
import torch
from test_training import CPU, loaded
from torch import nn

from pipeline.common.errors import UsageError
from pipeline.config.paths import student_folder
from pipeline.config.schema import Config, Student, Teacher
from pipeline.models.activation_checkpointing import checkpoint_activations
from pipeline.models.build import NormalizedModel, build, build_teacher
from pipeline.models.weights import read_weights
from pipeline.training.identity import configured_student
from stages import finetune, teacher, train_student

MEAN = 0.5, 0.5, 0.5
ON = "student.checkpoint_activations=true"
MODELS = {
    "deit_tiny_distilled_patch16_224": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2},
    "convnext_atto": {"dims": [8] * 4, "depths": [1] * 4},
}


def gradients(name: str, recompute: bool) -> tuple[list[torch.Tensor], int]:
    """Of a step with drop-path and dropout, and the bytes that it keeps for the backward pass."""
    section = Student(model=name, drop_path=0.5, dropout=0.2 if "deit" in name else 0.0, kwargs=MODELS[name])
    model, kept = build(section, 3, MEAN, MEAN, size=None if "convnext" in name else 32), 0
    if recompute:
        checkpoint_activations(model, [model])

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    model.train()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, distilled = model(255 * torch.rand(4, 3, 32, 32))
    (logits.square().sum() + distilled.square().sum()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], kept


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_with_drop_path_and_fewer_activations_are_kept(name):
    (plain, everything), (recomputed, some) = gradients(name, False), gradients(name, True)
    assert len(plain) > 10 and all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert some < 0.7 * everything


def test_a_student_ends_with_the_same_weights_in_the_same_state_folder(taught, monkeypatch):
    brief, found, calls = ("student.epochs=2", "student.accumulation=2"), [], []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))
    for changes in ((), (ON,)):
        shutil.rmtree("work/state")
        assert not calls
        train_student.run(loaded(*brief, *changes), CPU, "hard")
        folders = [path.name for path in Path("work/state").iterdir()]
        found.append((read_weights(student_folder(taught, "hard") / "weights.safetensors"), folders))
    assert calls and found[0][1] == found[1][1]
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())


def test_it_is_not_part_of_a_runs_identity_but_the_precision_is():
    plain, *others = (
        configured_student(Config(), student, "index")
        for student in (Student(), Student(checkpoint_activations=True), Student(precision="float16"))
    )
    assert [plain == other for other in others] == [True, False]


def test_batch_norm_in_training_mode_is_refused_by_name():
    network = build_teacher(Teacher(model="resnet10t"), 3)
    with pytest.raises(UsageError, match=r"(?s)'resnet10t'.*without batch norm.*BatchNorm.*set checkpoint_activations to"):
        checkpoint_activations(network, [network])
    checkpoint_activations(network, [])  # in eval mode nothing is updated


class Unsupporting(nn.Linear):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"  # as timm's models that do not


class Unlike(nn.Linear):
    def set_grad_checkpointing(self) -> None:
        """Of a model of one's own: it does not take what timm's take."""


@pytest.mark.parametrize("kind", [nn.Linear, Unsupporting, Unlike])
def test_a_model_without_support_is_refused_by_name(kind):
    model = NormalizedModel(kind(1, 1), MEAN, MEAN, name="mine")
    with pytest.raises(UsageError, match=r"(?s)model 'mine'.*supports it"):
        checkpoint_activations(model, [model])


@pytest.mark.parametrize("section", ["teacher", "student", "finetune", "teacher_finetune"])
def test_it_is_refused_with_compile_in_every_section(taught, section):
    with pytest.raises(UsageError, match=rf"{section}\.checkpoint_activations must be false with {section}\.compile"):
        loaded(f"{section}.checkpoint_activations=true", f"{section}.compile=true", "teacher_finetune.epochs=1",
               "teacher_finetune.batch_size=8")  # fmt: skip


def test_runs_of_networks_with_batch_norm_are_refused(taught):
    with pytest.raises(UsageError, match="without batch norm"):
        teacher.run(loaded("teacher.checkpoint_activations=true"), CPU)


def test_fine_tuning_has_its_own_setting(taught):
    train_student.run(loaded("student.epochs=1"), CPU, "hard")
    finetune.run(loaded("student.epochs=1", "finetune.checkpoint_activations=true"), CPU, "hard", teacher="online")
