"""One training run: all that it is made of, and its identity."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import Student, Training
from pipeline.groups import Groups
from pipeline.models import Normalised, parameter_count
from pipeline.plan import Plan
from pipeline.shards import Index
from pipeline.teaching import Answer, NoTeacher

TRAINING_VERSION = 4  # bump on any change of what a step computes, or finished runs would be taken for it


@dataclass
class Run:
    """One training run."""

    name: str
    folder: Path
    """Of its state: checkpoints and log.jsonl; named by the identity's fingerprint."""
    identity: dict[str, Any]
    """All that the weights depend on, as JSON values."""
    settings: Training
    plan: Plan
    train: Index
    val: Index
    model: Normalised
    size: int
    crop: float
    teacher: Callable[[Groups, torch.Tensor], Answer | None] = field(default_factory=NoTeacher)
    distillation: Student | None = None
    """Gives distillation, alpha, tau and reduction; None trains on labels alone."""
    device: torch.device = torch.device("cpu")
    train_mode: bool = True
    learning: list[nn.Module] = field(default_factory=list)
    """Parts that alone learn and are in training mode; none given: all of it."""

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.plan.steps_per_epoch

    @property
    def distilled(self) -> bool:
        """Whether a teacher is listened to."""
        return self.distillation is not None and self.distillation.distillation != "none"


def run_identity(**parts: Any) -> dict[str, Any]:
    """All that a run's weights depend on, TRAINING_VERSION too; its fingerprint names the state."""
    return parts | {"training_version": TRAINING_VERSION}


NAMED_BY = ("teacher_settings", "teacher_finetune", "student", "finetune", "recipe", "index")


def named_by(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that a configuration and its index tell without any weights."""
    return {key: identity[key] for key in NAMED_BY if key in identity}


def describe_run(run: Run) -> str:
    """What a run would do: images, steps, views, folder."""
    plan, epochs = run.plan, run.settings.epochs
    wanted = plan.views_seen(epochs)
    text = (
        f"{run.name}: {len(run.train):,} images at {run.size} px, {epochs} epochs x {plan.steps_per_epoch:,} steps"
        f" of {plan.batch_groups} groups = {run.steps:,} steps; {parameter_count(run.model.model):,} parameters\n"
        f"  state: {run.folder}"
    )
    if wanted > plan.views:
        text += f"\n  {wanted} views wanted, {plan.views} stored: each comes round {wanted / plan.views:.1f} times"
    return text
