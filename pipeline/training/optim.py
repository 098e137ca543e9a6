"""DeiT's optimizer, schedule and average of the weights (paper, section 6 and Table 9; main.py)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from pipeline.config.schema import Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """DeiT's two groups: no decay of biases, norms and everything 1-D, nor of the model's `no_weight_decay()`.

    dist_token is decayed: timm 0.3.2, which DeiT pins, does not list it; timm does today.
    """
    listed: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    spared = set(listed()) - {"dist_token"}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [parameter for name, parameter in named if parameter.ndim > 1 and name not in spared]
    rest = [parameter for name, parameter in named if parameter.ndim <= 1 or name in spared]
    return [{"params": rest, "weight_decay": 0.0}, {"params": plain, "weight_decay": weight_decay}]


def peak_rate(settings: Training) -> float:
    """lr * batch_size / 512, the batch being all ranks' with repeated copies."""
    return settings.lr * settings.batch_size / 512


def build_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW (eps 1e-8, betas 0.9, 0.999), or SGD with Nesterov's momentum as timm's `sgd` has it.

    Fused: one pass over the weights instead of many, on a CPU too.
    """
    groups, rate = parameter_groups(model, settings.weight_decay), peak_rate(settings)
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(groups, rate, momentum=momentum, nesterov=momentum > 0, fused=True)
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, settings: Training) -> CosineLRScheduler:
    """timm's cosine, stepped per epoch; warm-up counts into the cosine's epochs, as in DeiT.

    `min_lr` and `warmup_lr` are not scaled by the batch; without `min_lr` the rate stays constant.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs,
        lr_min=peak_rate(settings) if settings.min_lr is None else settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
        warmup_prefix=False,
    )


def scheduled_epoch(epoch: int) -> int:
    """What the schedule is asked for in `epoch`: DeiT steps it after an epoch, so it lags by one."""
    return max(epoch - 1, 0)


class Average(nn.Module):
    """The exponential moving average of a model's weights and buffers, `module`: to the bit timm's ModelEmaV3.

    Its state dict is ModelEmaV3's too. The tensors are listed once, as listing them costs the host a millisecond a
    step; so the model keeps its tensors from now on, whatever their values.
    """

    module: Any  # a copy of the model, of its class

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay
        own, theirs = (list(of.state_dict(keep_vars=True).values()) for of in (self.module, model))
        pairs = list(zip(own, theirs, strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights after `step`; after steps 0 and 1 they are taken as they are."""
        own, theirs = zip(*self.averaged, strict=True)
        weight = 1.0 - (self.decay if step > 1 else 0.0)
        torch._foreach_lerp_(own, theirs, weight=weight)  # pyright: ignore[reportPrivateImportUsage]
        for own, theirs in self.copied:
            own.copy_(theirs)
