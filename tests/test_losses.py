"""Losses: weighted sums that are DeiT's losses where every weight is one."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy

from pipeline.training.losses import base_loss, hard_loss, soft_loss

N, CLASSES = 24, 10


def rand(*shape, scale=3.0, seed=0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


LOGITS = rand(N, CLASSES)
TARGETS = rand(N, CLASSES, seed=1).softmax(1)
LABELS = rand(N, CLASSES, seed=2).argmax(1)
TEACHER = rand(N, CLASSES, seed=3)
ONES = torch.ones(N)

LOSSES = {
    "base": lambda rows, weights: base_loss(LOGITS[rows], TARGETS[rows], weights),
    "hard": lambda rows, weights: hard_loss(LOGITS[rows], LABELS[rows], weights),
    "soft numel": lambda rows, weights: soft_loss(LOGITS[rows], TEACHER[rows], weights, 3.0, "numel"),
    "soft batchmean": lambda rows, weights: soft_loss(LOGITS[rows], TEACHER[rows], weights, 1.5, "batchmean"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
ALL = torch.arange(N)


def test_base_loss_is_timms_soft_target_cross_entropy():
    ours = base_loss(LOGITS, TARGETS, ONES) / N
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(LOGITS, TARGETS), rtol=1e-6, atol=0)


def test_base_loss_of_smoothed_labels_is_torchs():
    smooth = torch.full((N, CLASSES), 0.01).scatter_(1, LABELS[:, None], 0.91)
    theirs = F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(base_loss(LOGITS, smooth, ONES) / N, theirs, rtol=1e-6, atol=0)


def test_hard_loss_is_cross_entropy_against_the_teachers_class():
    ours = hard_loss(LOGITS, TEACHER.argmax(1), ONES) / N
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, TEACHER.argmax(1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_soft_loss_by_numel_is_deits(tau):
    student, teacher = F.log_softmax(LOGITS / tau, 1), F.log_softmax(TEACHER / tau, 1)
    theirs = F.kl_div(student, teacher, reduction="sum", log_target=True) * (tau * tau) / LOGITS.numel()
    ours = soft_loss(LOGITS, TEACHER, ONES, tau, "numel") / N
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_soft_loss_by_batchmean_is_torchs(tau):
    student, teacher = F.log_softmax(LOGITS / tau, 1), F.log_softmax(TEACHER / tau, 1)
    theirs = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau * tau
    ours = soft_loss(LOGITS, TEACHER, ONES, tau, "batchmean") / N
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["numel", "batchmean"])
def test_soft_loss_is_zero_where_the_student_is_the_teacher_and_positive_elsewhere(reduction):
    weights = torch.eye(N)
    assert abs(soft_loss(TEACHER + 5, TEACHER, ONES, 3.0, reduction)) < 1e-4
    assert all(soft_loss(LOGITS, TEACHER, one, 3.0, reduction) > 0 for one in weights)


@every_loss
def test_row_of_weight_0_counts_nothing(loss):
    weights = torch.ones(N)
    weights[5:] = 0
    torch.testing.assert_close(loss(ALL, weights), loss(ALL[:5], torch.ones(5)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["base", "hard", "soft"])
def test_row_of_weight_0_has_no_gradient(name):
    logits, weights = LOGITS.clone().requires_grad_(), torch.ones(N)
    weights[3] = 0
    match name:
        case "base":
            base_loss(logits, TARGETS, weights).backward()
        case "hard":
            hard_loss(logits, LABELS, weights).backward()
        case "soft":
            soft_loss(logits, TEACHER, weights, 3.0, "numel").backward()
    assert [number for number, row in enumerate(logits.grad) if not row.any()] == [3]


@every_loss
def test_weight_counts_a_row_so_many_times(loss):
    twice = torch.cat([ALL, ALL[:1]])
    weights = torch.ones(N)
    weights[0] = 2
    torch.testing.assert_close(loss(ALL, weights), loss(twice, torch.ones(N + 1)), rtol=1e-6, atol=0)


@every_loss
@pytest.mark.parametrize("parts", [2, 3, 24])
def test_parts_of_a_batch_add_up_to_the_batch(loss, parts):
    weights = rand(N, seed=4).abs()
    whole = loss(ALL, weights)
    split = sum(loss(rows, weights[rows]) for rows in ALL.chunk(parts))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=0)


@every_loss
def test_logits_of_half_precision_are_judged_in_float32(loss, monkeypatch):
    monkeypatch.setitem(globals(), "LOGITS", LOGITS.bfloat16())
    found = loss(ALL, ONES)
    monkeypatch.setitem(globals(), "LOGITS", LOGITS.float())
    assert found.dtype == torch.float32 and torch.equal(found, loss(ALL, ONES))
