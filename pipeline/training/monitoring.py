"""What watches a run: validation, warnings, and a stop where the loss diverges."""

import math
from typing import Any

import numpy as np
import torch

from pipeline.common.errors import PipelineError
from pipeline.models.build import NormalizedModel
from pipeline.models.evaluation import classifiers, predict, top_k_accuracy
from pipeline.training.run import Run


def validate(run: Run, model: NormalizedModel, prefix: str = "") -> dict[str, float]:
    """Top-1 on the validation set: of the class head and, after distillation, of the mean of both heads' logits."""
    logits = predict(model, run.val, run.size, run.crop, 256, run.settings.workers, run.device, run.settings.precision)
    scores = classifiers(logits, model.distilled and run.distilled)
    labels = torch.from_numpy(run.val.labels())
    return {f"{prefix}val_top1_{name}": top_k_accuracy(scores[name], labels, 1) for name in ("class", "mean") if name in scores}


def describe_epoch(run: Run, metrics: dict[str, Any]) -> str:
    """The metrics of an epoch, in one line."""
    values = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float))
    return f"{run.name}: epoch {metrics['epoch']} of {run.settings.epochs}: {values}"


def accuracy_warning(run: Run, metrics: dict[str, Any]) -> str:
    """A warning if, a third of the way through the run or later, accuracy is no better than a guess; otherwise empty."""
    chance, frequent = 1 / len(run.train.classes), np.bincount(run.val.labels()).max() / len(run.val)
    early = 3 * metrics["epoch"] < run.settings.epochs
    if early or metrics.get("val_top1_class", 1.0) > max(1.5 * chance, frequent):
        return ""
    return (
        f"{run.name}: top-1 {metrics['val_top1_class']:.2%} at epoch {metrics['epoch']} of {run.settings.epochs} is hardly"
        f" better than always predicting the most frequent class ({frequent:.2%}): check the learning rate, the views"
        " (pipeline views), and whether train and val have the same classes"
    )


def check_step(run: Run, step: int, loss: float, grad_norm: float, first_loss: float) -> None:
    """Refuse a loss or gradient that is not finite, or a loss above `stop_above` times the run's first.

    Raises:
        PipelineError: names the step and its groups.
    """
    limit = math.inf
    if run.settings.stop_above:
        limit = run.settings.stop_above * max(first_loss, math.log(len(run.train.classes)))
    if math.isfinite(loss) and math.isfinite(grad_norm) and loss < limit:
        return
    items = run.plan.items(step)
    named = ", ".join(f"{run.train.names[i.shard]} group {i.group} view {i.view}" for i in items[:4])
    raise PipelineError(
        f"{run.name}: step {step}",
        expected="a finite loss and gradient" + f", and a loss below {limit:.3g}" * math.isfinite(limit),
        found=f"loss {loss:.4g}, gradient norm {grad_norm:.4g} over {len(items)} groups"
        f" ({named}" + ", ..." * (len(items) > 4) + ")",
        do="lower lr, set clip_grad, or use float32; the last good checkpoint is kept",
    )
