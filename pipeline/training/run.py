"""One training run: all that it is made of, and its identity."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.batches.batch import Batch
from pipeline.batches.plan import Plan
from pipeline.common.distributed import world_size
from pipeline.config.schema import Student, Training
from pipeline.config.validation import fingerprint
from pipeline.models.build import NormalizedModel, parameter_count
from pipeline.shards.index import Index

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher said about each slot: int64 (N,), and float32 logits (N, classes) or None."""

    argmax: torch.Tensor
    logits: torch.Tensor | None


class NoTeacher:
    def __call__(self, batch: Batch, pictures: torch.Tensor) -> None:
        return None


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
    model: NormalizedModel
    size: int
    crop: float
    teacher: Callable[[Batch, torch.Tensor], TeacherOutput | None] = field(default_factory=NoTeacher)
    distillation: Student | None = None
    """Gives distillation, alpha, tau and reduction; None trains on labels alone."""
    device: torch.device = CPU
    train_mode: bool = True
    learning: list[nn.Module] = field(default_factory=list)
    """Parts that alone learn and are in training mode; none given: all of it."""

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.plan.steps_per_epoch

    @property
    def validation(self) -> str:
        """Names what the run is validated on; no part of its identity, as no weight depends on it."""
        return fingerprint([self.val.fingerprint, self.crop])

    @property
    def sees_slices(self) -> bool:
        """Whether a batch norm learns, to which the slices of the batch matter."""
        return "accumulation" in self.identity

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """What must be the same where the run goes on."""
        return self.identity | {"ranks": world_size()} if self.sees_slices else self.identity

    @property
    def distilled(self) -> bool:
        """Whether a teacher is listened to."""
        return self.distillation is not None and self.distillation.distillation != "none"


def has_batch_norm(parts: Iterable[nn.Module]) -> bool:
    """Whether any of the modules contains one."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for part in parts for module in part.modules())


def describe_run(run: Run) -> str:
    """What a run would do: images, steps, views, folder."""
    plan, epochs = run.plan, run.settings.epochs
    wanted = plan.views_seen(epochs)
    text = (
        f"{run.name}: {len(run.train):,} images at {run.size} px, {epochs} epochs x {plan.steps_per_epoch:,} steps"
        f" of {plan.batch_groups} groups = {run.steps:,} steps; {parameter_count(run.model.model):,} parameters\n"
        f"  state: {run.folder}"
    )
    if run.sees_slices:
        slots = plan.batch_groups * plan.recipe.group_size // (world_size() * run.settings.accumulation)
        text += f"\n  ranks: {world_size()}, and it goes on with as many only: batch norm sees {slots} pictures at a time"
    if wanted > plan.views:
        text += f"\n  {wanted} views wanted, {plan.views} stored: each comes round {wanted / plan.views:.1f} times"
    return text
