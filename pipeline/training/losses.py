"""DeiT's losses, as weighted sums: the caller divides by the step's global weight.

So ranks, workers and accumulation change only rounding, and unused slots, whose weight is 0, do not count.
Every function takes logits (N, classes) and weights (N,); the single losses return a scalar.
"""

import torch
from torch.nn.functional import cross_entropy, log_softmax

from pipeline.config.schema import Student
from pipeline.training.run import TeacherOutput


def base_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against mixed, smoothed targets (N, classes): timm's SoftTargetCrossEntropy."""
    return (weights * -(targets * log_softmax(logits.float(), 1)).sum(1)).sum()


def hard_loss(logits: torch.Tensor, classes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against the teacher's argmax, int64 (N,), neither smoothed nor mixed (eq. 3)."""
    return (weights * cross_entropy(logits.float(), classes, reduction="none")).sum()


def soft_loss(
    logits: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, tau: float, reduction: str
) -> torch.Tensor:
    """tau^2 KL(teacher || student) at temperature tau (eq. 2), against teacher logits (N, classes).

    The reduction `numel` also divides by the number of classes, as DeiT's code does; `batchmean` does not.
    """
    student = log_softmax(logits.float() / tau, 1)
    teacher = log_softmax(teacher.float() / tau, 1)
    divergence = (teacher.exp() * (teacher - student)).sum(1)
    scale = tau * tau / (logits.shape[1] if reduction == "numel" else 1)
    return (weights * divergence).sum() * scale


def sampled_loss(
    logits: torch.Tensor, samples: torch.Tensor, weights: torch.Tensor, tau: float, reduction: str
) -> torch.Tensor:
    """-tau^2 sum t log student at temperature tau, where t is each class's share of k drawn classes, int64 (N, k).

    If they were drawn from the teacher's softmax at tau, the expectation of the gradient is that of `soft_loss`, and
    the expectation of the loss is higher by tau^2 times the teacher's entropy. Reductions as in `soft_loss`.
    """
    cross_entropy = -log_softmax(logits.float() / tau, 1).gather(1, samples).mean(1)
    scale = tau * tau / (logits.shape[1] if reduction == "numel" else 1)
    return (weights * cross_entropy).sum() * scale


def distillation_losses(
    logits: torch.Tensor,
    distilled: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    predictions: TeacherOutput | None,
    student: Student | None,
) -> torch.Tensor:
    """The loss of a slice, and its parts from the labels and from the teacher: (3,), only the first with a gradient.

    Args:
        logits: of the class head, which learns from `labels`, (N, classes).
        distilled: of the head that learns from the teacher.
        predictions: the teacher's; None: the loss is that of the labels.
        student: the settings of distillation.
    """
    label_loss = base_loss(logits, labels, weights)
    if student is None or predictions is None:
        return torch.stack([label_loss, label_loss.detach(), torch.zeros_like(label_loss)])
    if student.distillation == "hard":
        teacher_loss = hard_loss(distilled, predictions.argmax, weights)
    elif predictions.samples is not None:
        teacher_loss = sampled_loss(distilled, predictions.samples, weights, student.tau, student.soft_reduction)
    else:
        assert predictions.logits is not None, "soft distillation needs logits"
        teacher_loss = soft_loss(distilled, predictions.logits, weights, student.tau, student.soft_reduction)
    loss = (1 - student.alpha) * label_loss + student.alpha * teacher_loss
    return torch.stack([loss, label_loss.detach(), teacher_loss.detach()])
