"""One training run: everything that the training loop needs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.batches.batch import Batch
from pipeline.batches.plan import Plan, training_plan
from pipeline.common.distributed import world_size
from pipeline.common.errors import NotReady
from pipeline.config.paths import state_folder
from pipeline.config.schema import Config, Recipe, Student, Training
from pipeline.config.validation import fingerprint
from pipeline.models.activation_checkpointing import checkpoint_activations
from pipeline.models.build import NormalizedModel, parameter_count
from pipeline.shards.index import Index
from pipeline.shards.published import check_cache
from pipeline.training.identity import run_identity, validation_fingerprint
from pipeline.training.trackers import Trackers, configured_trackers
from pipeline.training.unlabelled import check_unlabelled

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's predictions for each slot."""

    argmax: torch.Tensor
    """int64 (N,)"""
    logits: torch.Tensor | None
    """float32 (N, classes), or None"""
    samples: torch.Tensor | None = None
    """Classes drawn from its softmax, int64 (N, k), in place of logits; or None."""


class NoTeacher:
    """The teacher of a run on labels alone."""

    def __call__(self, batch: Batch, pictures: torch.Tensor) -> None:
        return None


@dataclass
class Run:
    """One training run."""

    name: str
    folder: Path
    """The state folder: checkpoints and log.jsonl; named by the identity's fingerprint."""
    identity: dict[str, Any]
    """Everything that the weights depend on, as JSON values."""
    settings: Training
    plan: Plan
    train: Index
    val: Index
    model: NormalizedModel
    size: int
    """Height and width of views and validation images, in pixels."""
    crop: float
    """Centre crop of validation images, as a fraction."""
    teacher: Callable[[Batch, torch.Tensor], TeacherOutput | None] = field(default_factory=NoTeacher)
    distillation: Student | None = None
    """Settings of distillation: kind, alpha, tau and reduction; None trains on labels alone."""
    device: torch.device = CPU
    train_mode: bool = True
    """Dropout and drop-path are on, and batch norm uses the batch's statistics."""
    trainable: list[nn.Module] = field(default_factory=list)
    """Only these modules are trained and in training mode; empty: the entire model is."""
    thaw_epoch: int | None = None
    """From the start of this epoch on the entire model is trained, not only `trainable`; None: never."""
    trackers: Trackers = field(default_factory=dict)
    """What the log is copied to."""

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.plan.steps_per_epoch

    @property
    def thaw_step(self) -> int | None:
        """The first step in which the entire model is trained, where `trainable` is trained before."""
        return None if self.thaw_epoch is None else self.thaw_epoch * self.plan.steps_per_epoch

    def trained_modules(self, step: int) -> list[nn.Module]:
        """The modules that are trained in a step; none: the entire model is."""
        return [] if self.thaw_step is not None and step >= self.thaw_step else self.trainable

    @property
    def validation(self) -> str:
        """See `validation_fingerprint`."""
        return validation_fingerprint(self.val.fingerprint, self.crop)

    @property
    def depends_on_slices(self) -> bool:
        """Whether a batch norm is in training mode, whose statistics are those of a slice of the batch."""
        return "accumulation" in self.identity

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """What must be unchanged for the run to be resumed."""
        return self.identity | {"ranks": world_size()} if self.depends_on_slices else self.identity

    @property
    def distilled(self) -> bool:
        """Whether a teacher is used."""
        return self.distillation is not None and self.distillation.distillation != "none"


def prepare_run(
    config: Config,
    name: str,
    configured: dict[str, Any],
    dependencies: dict[str, Any],
    *,
    settings: Training,
    recipe: Recipe,
    views: int,
    train: Index,
    model: NormalizedModel,
    train_mode: bool = True,
    trainable: Sequence[nn.Module] = (),
    thaw_epoch: int | None = None,
    **fields: Any,
) -> Run:
    """A run of an experiment: its plan, its identity and the state folder that this names.

    Args:
        configured: the configuration's part of the identity.
        dependencies: the other part, see `run_identity`.
        views: the number of views per image that the plan cycles through.
        fields: additional fields of Run.

    Raises:
        UsageError: it needs labels, and there are images without; or its model cannot checkpoint activations.
    """
    check_cache(train, settings.open_shards)
    check_unlabelled(train.unlabelled, name, fields.get("distillation"), model.distilled)
    partly = trainable and thaw_epoch is None
    in_training = trainable if partly else [model] if train_mode else []
    identity = run_identity(configured, settings, has_batch_norm(in_training), **dependencies)
    folder = state_folder(config, fingerprint(identity))
    if settings.checkpoint_activations:
        checkpoint_activations(model, in_training)
    return Run(
        name=name, folder=folder, identity=identity, settings=settings,
        trackers=configured_trackers(config, name, identity, folder),
        plan=training_plan(train, recipe, settings, views), train=train, model=model, size=recipe.size,
        train_mode=train_mode, trainable=list(trainable), thaw_epoch=thaw_epoch, **fields,
    )  # fmt: skip


def has_batch_norm(parts: Iterable[nn.Module]) -> bool:
    """Whether any of the modules contains one."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for part in parts for module in part.modules())


def describe_run(run: Run) -> str:
    """A run in words: images, steps, views, state folder."""
    plan, epochs = run.plan, run.settings.epochs
    views = plan.views_seen(epochs)
    text = (
        f"{run.name}: {len(run.train):,} images at {run.size} px, {epochs} epochs x {plan.steps_per_epoch:,} steps"
        f" of {plan.batch_groups} groups = {run.steps:,} steps; {parameter_count(run.model.model):,} parameters\n"
        f"  state: {run.folder}"
    )
    if run.depends_on_slices:
        slots = plan.batch_groups * plan.recipe.group_size // (world_size() * run.settings.accumulation)
        text += f"\n  ranks: {world_size()}; it resumes only with this number, as batch norm sees {slots} images at a time"
    if run.distillation and run.distillation.reuse_view is not None:
        text += (
            f"\n  warning: reuse_view {run.distillation.reuse_view}: every view is trained with the predictions for this one,"
            " so the student does not see what the teacher saw"
        )
    if views > plan.views:
        text += f"\n  {views} views needed, {plan.views} configured: each is used {views / plan.views:.1f} times"
    return text


@contextlib.contextmanager
def print_if_not_ready(dry_run: bool) -> Iterator[None]:
    """In a dry run, print what an earlier stage has not made yet instead of raising NotReady."""
    try:
        yield
    except NotReady as error:
        if not dry_run:
            raise
        print(f"not yet: {error.what}")
