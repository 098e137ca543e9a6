"""DeiT's optimizer, schedule and EMA of the weights (paper, section 6 and Table 9; main.py)."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from pipeline.config.schema import Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """timm's two groups: without weight decay (biases, 1-D parameters, the model's `no_weight_decay()`), and the others.

    dist_token is decayed: timm 0.3.2, which DeiT pins, does not list it; today's timm does.
    """
    listed: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    # grouped at decay 1: at 0 timm makes one group, and a checkpoint would not fit another weight_decay's
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=set(listed()) - {"dist_token"})
    return [group | {"weight_decay": weight_decay * group["weight_decay"]} for group in groups]


def peak_lr(settings: Training) -> float:
    """lr * batch_size / 512, where the batch is that of all ranks, repeated copies included."""
    return settings.lr * settings.batch_size / 512


def build_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW (eps 1e-8, betas 0.9, 0.999), or SGD with Nesterov momentum as timm's `sgd`.

    Fused: one pass over the weights instead of many, also on a CPU.
    """
    groups, lr = parameter_groups(model, settings.weight_decay), peak_lr(settings)
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def add_momentum_buffers(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that SGD has not stepped yet a buffer of zeros, from which it steps as without one.

    The fused SGD refuses a mixture of parameters with and without buffers, as after a part was trained alone. And if a
    gradient scaler skips the first step, it leaves the buffers uninitialized that it creates in it.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


# with a single epoch it warns that the learning rate does not change, in terms of its own arguments
logging.getLogger(CosineLRScheduler.__module__).setLevel(logging.ERROR)


def build_schedule(optimizer: torch.optim.Optimizer, settings: Training) -> CosineLRScheduler:
    """timm's cosine schedule, stepped per epoch; warm-up is part of the cosine's epochs, as in DeiT.

    `min_lr` and `warmup_lr` are not scaled by the batch; without `min_lr` the learning rate stays constant.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs,
        lr_min=peak_lr(settings) if settings.min_lr is None else settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
        warmup_prefix=False,
    )


def scheduled_epoch(epoch: int) -> int:
    """The argument of the schedule's `step` in `epoch`: DeiT steps it after an epoch, so it lags by one."""
    return max(epoch - 1, 0)


class ModelEma(nn.Module):
    """The exponential moving average of a model's weights and buffers: bit-identical to timm's ModelEmaV3.

    Its state dict is ModelEmaV3's, too. The tensors are listed only once, as listing them costs the host a millisecond
    per step; so the model's tensors must not be replaced from now on.
    """

    module: Any  # a copy of the model, of its class

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay
        own, source = (list(module.state_dict(keep_vars=True).values()) for module in (self.module, model))
        pairs = list(zip(own, source, strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the model's weights after `step`; after steps 0 and 1 they are copied."""
        own, source = zip(*self.averaged, strict=True)
        weight = 1.0 - (self.decay if step > 1 else 0.0)
        torch._foreach_lerp_(own, source, weight=weight)  # pyright: ignore[reportPrivateImportUsage]
        for own, source in self.copied:
            own.copy_(source)
