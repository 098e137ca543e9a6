"""DeiT's losses, as weighted sums: the caller divides by the step's global weight.

So ranks, workers and accumulation change nothing but rounding, and unused slots count nothing.
Every function takes logits (N, classes) and weights (N,), and returns a scalar.
"""

import torch
from torch.nn.functional import cross_entropy, log_softmax


def base_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against mixed, smoothed targets (N, classes): timm's SoftTargetCrossEntropy."""
    return (weights * -(targets * log_softmax(logits.float(), 1)).sum(1)).sum()


def hard_loss(logits: torch.Tensor, classes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against the teacher's argmax int64 (N,): neither smoothed nor mixed (eq. 3)."""
    return (weights * cross_entropy(logits.float(), classes, reduction="none")).sum()


def soft_loss(
    logits: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, tau: float, reduction: str
) -> torch.Tensor:
    """tau^2 KL(teacher || student) at temperature tau (eq. 2), teacher logits (N, classes).

    `numel` divides by the classes too, as DeiT's code does; `batchmean` does not.
    """
    student = log_softmax(logits.float() / tau, 1)
    teacher = log_softmax(teacher.float() / tau, 1)
    divergence = (teacher.exp() * (teacher - student)).sum(1)
    scale = tau * tau / (logits.shape[1] if reduction == "numel" else 1)
    return (weights * divergence).sum() * scale
