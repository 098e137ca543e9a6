"""The optimizer and its schedule: DeiT's parameter groups and learning rates."""

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.config.schema import Finetune, Recipe, Student, Training
from pipeline.models.build import build_student
from pipeline.training.optim import (
    ModelEma,
    build_optimizer,
    build_schedule,
    parameter_groups,
    peak_lr,
    scheduled_epoch,
)

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def rates(settings: Training) -> list[float]:
    """The learning rate of every epoch."""
    optimizer = build_optimizer(torch.nn.Linear(2, 2), settings)
    schedule, found = build_schedule(optimizer, settings), []
    for epoch in range(settings.epochs):
        schedule.step(scheduled_epoch(epoch))
        found.append(optimizer.param_groups[0]["lr"])
    return found


def decayed_names(model: torch.nn.Module) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p] for group in parameter_groups(model, 0.05) if group["weight_decay"] for p in group["params"]}


def student(**changes) -> torch.nn.Module:
    return build_student(Student(kwargs=SMALL, **changes), Recipe(), 5, 16).model


def test_learning_rate_is_deits_in_every_epoch():
    expected = {
        0: 1e-6, 1: 1e-6, 2: 2.008e-4, 3: 4.006e-4, 4: 6.004e-4, 5: 8.002e-4, 6: 9.993e-4,
        50: 9.36e-4, 100: 7.57e-4, 150: 5.10e-4, 200: 2.62e-4, 250: 7.89e-5, 299: 1.01e-5,
    }  # fmt: skip
    found = rates(Training())
    assert {epoch: found[epoch] for epoch in expected} == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("batch", [512, 64])
def test_fine_tunings_rate_is_constant_after_warm_up_at_any_batch(batch):
    scale = batch / 512
    found = rates(Finetune(batch_size=batch))
    assert found[:2] == [1e-6, 1e-6]
    assert found[6:] == pytest.approx([5e-6 * scale] * 24)
    if batch == 512:  # README_deit.md's command
        assert found[2:6] == pytest.approx([1.8e-6, 2.6e-6, 3.4e-6, 4.2e-6])


def test_rate_grows_with_the_global_batch_alone():
    assert peak_lr(Training(batch_size=1024)) == 1e-3
    assert peak_lr(Training(batch_size=1024, accumulation=4)) == 1e-3


def test_what_is_decayed_is_deits():
    everything = {name for name, parameter in student().named_parameters() if parameter.ndim > 1}
    assert decayed_names(student()) == everything - {"pos_embed", "cls_token"}


def test_distillation_token_is_decayed_as_by_the_timm_that_deit_pins():
    assert "dist_token" in decayed_names(student())


def test_what_another_model_spares_from_decay_is_spared():
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_classes=3)
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert tables and not tables & decayed_names(model)


def test_every_parameter_is_in_one_group():
    model = student()
    found = [id(parameter) for group in parameter_groups(model, 0.05) for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_groups_and_their_order_are_those_of_earlier_checkpoints(decay):
    model = student()
    spared = {"pos_embed", "cls_token"}
    named = list(model.named_parameters())
    expected = [
        [parameter for name, parameter in named if parameter.ndim <= 1 or name in spared],
        [parameter for name, parameter in named if parameter.ndim > 1 and name not in spared],
    ]
    groups = parameter_groups(model, decay)
    assert [group["weight_decay"] for group in groups] == [0.0, decay]
    assert [[id(parameter) for parameter in group["params"]] for group in groups] == [
        [id(parameter) for parameter in group] for group in expected
    ]


def test_adamw_is_deits():
    optimizer = build_optimizer(student(), Training())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_sgd_is_timms_with_nesterovs_momentum():
    optimizer = build_optimizer(student(), Training(optimizer="sgd"))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"]


def test_parameter_that_does_not_learn_is_left_out():
    model = student()
    model.head.weight.requires_grad_(False)
    assert "head.weight" not in decayed_names(model)


def averages(decay: float = 0.9) -> tuple[nn.Module, ModelEma, ModelEmaV3]:
    """A network with batch norm that has changed in seven steps, and its average, ours and timm's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
    ours, theirs = ModelEma(model, decay), ModelEmaV3(model, decay)
    for step in range(7):
        model(torch.randn(8, 3, 8, 8))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(step)
        theirs.update(model, step=step)
    return model, ours, theirs


def test_the_average_of_the_weights_is_timms_to_the_bit():
    model, ours, theirs = averages()
    found, expected = ours.state_dict(), theirs.state_dict()
    assert list(found) == list(expected) and len(found) == len(model.state_dict())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["module.0.weight"], model[0].weight) and found["module.1.num_batches_tracked"] == 7


def test_the_average_goes_on_from_what_timms_has_saved():
    model, _, theirs = averages()
    resumed = ModelEma(model, 0.9)
    resumed.load_state_dict(theirs.state_dict())
    resumed.update(7)
    theirs.update(model, step=7)
    assert torch.equal(resumed.module[0].weight, theirs.module[0].weight)
