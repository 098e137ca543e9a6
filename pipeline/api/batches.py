"""Batches for a custom training loop: the views that the teacher saw, mixed, with what it predicted for them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.batches.batch import Batch, mixed, targets
from pipeline.batches.loader import step_loader
from pipeline.batches.plan import Plan, training_plan
from pipeline.batches.transfer import on_device
from pipeline.common.cores import allow_open_files, resolve_workers
from pipeline.common.errors import UsageError
from pipeline.config.params import load_config
from pipeline.config.schema import PURPOSES, Config, Recipe, Student, Training
from pipeline.config.store_spec import StoreSpec, store_spec
from pipeline.config.types import Triple
from pipeline.config.validation import fingerprint
from pipeline.shards.index import Index
from pipeline.shards.published import check_cache, open_index
from pipeline.training.identity import TRAINING_VERSION
from pipeline.training.run import TeacherOutput
from pipeline.training.teachers import create_teacher
from pipeline.views.draw import recipe_fingerprint

Teacher = Callable[[Batch, torch.Tensor], TeacherOutput | None]


class StudentBatch(NamedTuple):
    """One rank's share of a step: N slots, of which unused ones repeat a sample and have weight 0; P x P pixels."""

    pictures: torch.Tensor
    """The mixed views, float32 or uint8 (N, 3, P, P) in 0..255, RGB."""
    targets: torch.Tensor
    """Smoothed, mixed labels, float32 (N, classes); an image without a label has a share of 0."""
    argmax: torch.Tensor | None
    """The teacher's class for each picture, int64 (N,); None for a student without distillation."""
    logits: torch.Tensor | None
    """The teacher's logits, float32 (N, classes); None unless they were asked for."""
    weights: torch.Tensor
    """float32 (N,): 1 for a sample, 0 for an unused slot."""
    step: int
    step_samples: int
    """Samples in the step over all ranks and accumulation steps: the divisor of a loss that is summed over samples."""
    drawn: torch.Tensor | None = None
    """Classes drawn from the teacher's softmax, int64 (N, k), for `sampled_loss`; None unless the store holds them."""

    def without_padding(self) -> "StudentBatch":
        """The batch without its unused slots, for a loss that averages over the batch; N then differs between steps."""
        used = self.weights > 0
        return self._replace(
            pictures=self.pictures[used],
            targets=self.targets[used],
            argmax=None if self.argmax is None else self.argmax[used],
            logits=None if self.logits is None else self.logits[used],
            drawn=None if self.drawn is None else self.drawn[used],
            weights=self.weights[used],
        )


class Batches:
    """An open store with its shards, as the batches of a student's steps; see `open_batches`.

    What a step holds follows from its number alone: it is the same for any number of ranks, workers and accumulation
    steps.
    """

    classes: list[str]
    """Class names, in the order of the logits."""
    size: int
    """Height and width of the pictures in pixels."""
    mean: Triple
    """The recipe's mean, per channel, of pictures in 0..1: what the pipeline normalizes a student's input with."""
    std: Triple
    """The recipe's standard deviation, likewise."""
    epochs: int
    steps_per_epoch: int
    fingerprint: str
    """A hash of everything that the batches depend on. Save it with a checkpoint, and resume only where it is equal."""

    def __init__(
        self, plan: Plan, index: Index, teacher: Teacher, settings: Training, identity: str,
        *, slices: int, own: range, device: torch.device, dtype: torch.dtype, workers: int | None,
    ):  # fmt: skip
        self._plan, self._index, self._teacher, self._smoothing = plan, index, teacher, settings.smoothing
        self._slices, self._own, self._device, self._dtype, self._workers = slices, own, device, dtype, workers
        self.classes, self.size = list(index.classes), plan.recipe.size
        self.mean, self.std = plan.recipe.mean, plan.recipe.std
        self.epochs, self.steps_per_epoch, self.fingerprint = settings.epochs, plan.steps_per_epoch, identity

    def __len__(self) -> int:
        """Steps in all epochs."""
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[StudentBatch]:
        return self.steps()

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[StudentBatch]:
        """Yield this rank's batches of steps `start` to `stop` - 1, as many per step as there are accumulation steps.

        Args:
            stop: None: up to the last epoch's end. The order is endless, so it may be any number.

        Raises:
            PipelineError: a shard or the store is damaged, or a view is not the one that the teacher saw.
        """
        steps = range(start, len(self) if stop is None else stop)
        if steps.start < 0:
            raise UsageError("Batches.steps", expected="a step number of at least 0", found=str(start))
        pin = self._device.type == "cuda"
        allow_open_files(resolve_workers(self._workers, pin))
        loader = step_loader(self._plan, self._index, steps, self._own, self._slices, self._workers, pin)
        return self._complete(steps, on_device(loader, self._device))

    def _complete(self, steps: range, batches: Iterable[Batch]) -> Iterator[StudentBatch]:
        numbers = (step for step in steps for _ in self._own)
        for step, batch in zip(numbers, batches, strict=True):
            yield self._with_predictions(batch, step)

    @torch.no_grad()
    def _with_predictions(self, batch: Batch, step: int) -> StudentBatch:
        pictures = mixed(batch)
        predictions = self._teacher(batch, pictures)
        if self._dtype == torch.uint8:
            pictures = pictures.round_().to(torch.uint8)
        return StudentBatch(
            pictures=pictures,
            targets=targets(batch, len(self.classes), self._smoothing),
            argmax=None if predictions is None else predictions.argmax,
            logits=None if predictions is None else predictions.logits,
            weights=batch.weights.flatten(),
            step=step,
            step_samples=self._plan.weight(step),
            drawn=None if predictions is None else predictions.samples,
        )


def open_batches(
    config: Config | str | Path = "params.yaml",
    student: str = "hard",
    *,
    purpose: str = "train-student",
    store: str | None = None,
    logits: bool | None = None,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
) -> Batches:
    """Open the batches that `pipeline train-student`, or `finetune`, would train a student on.

    Args:
        config: a configuration, or the path of a YAML file. Paths in it are relative to the current folder.
        student: one of the configuration's `variants`. Its batch_size, epochs, seed, open_shards, smoothing and
            distillation are used; with the purpose finetune, those of `finetune`, and the variant's distillation.
        purpose: train-student or finetune, whose views and store differ in size.
        store: the path of a store to use instead of the published one.
        logits: whether to read the teacher's logits. None: if the student's distillation is soft; from a store of
            kind sampled, the drawn classes are read in their place.
        rank: this process's number among `world_size`. torch.distributed is not used.
        accumulation: batches per step and rank.
        device: where the tensors are.
        dtype: of the pictures. torch.uint8 rounds them: they then differ from the teacher's by up to 0.5 of 255.
        workers: rendering processes; None: chosen for the machine, 0: render in this process.

    Raises:
        PipelineError: the data set is not prepared, the store is missing or incomplete, or the arguments do not fit.
    """
    config = config if isinstance(config, Config) else load_config(config)
    settings, distilled, recipe = _settings(config, student, purpose)
    slices = _slices(settings, recipe, rank, world_size, accumulation)
    if dtype not in (torch.float32, torch.uint8):
        raise UsageError("open_batches: dtype", expected="torch.float32 or torch.uint8", found=str(dtype))
    spec, distilled = store_spec(config, purpose), _what_to_read(distilled, logits)
    _check_kind(spec, distilled, bool(logits), student)
    index, device = open_index(config, "train"), torch.device(device)
    check_cache(index, settings.open_shards)
    teacher, teacher_identity = create_teacher(config, distilled, purpose, index, device, store=store)
    return Batches(
        training_plan(index, recipe, settings, spec.views), index, teacher, settings,
        _identity(index, recipe, settings, teacher_identity, views=spec.views, pictures=str(dtype)),
        slices=slices, own=range(rank * accumulation, (rank + 1) * accumulation), device=device, dtype=dtype,
        workers=workers,
    )  # fmt: skip


def _identity(
    index: Index, recipe: Recipe, settings: Training, teacher: dict[str, Any] | None, **arguments: Any
) -> str:
    """The fingerprint of everything that the batches depend on."""
    order = {key: getattr(settings, key) for key in ("batch_size", "seed", "open_shards", "smoothing")}
    inputs = {"index": index.fingerprint, "recipe": recipe_fingerprint(recipe), "teacher": teacher}
    return fingerprint(inputs | order | arguments | {"training_version": TRAINING_VERSION})


def _what_to_read(student: Student, logits: bool | None) -> Student:
    """The student as one that is distilled softly if logits are wanted, and not softly if they are not."""
    if logits or (logits is False and student.distillation == "soft"):
        return student.model_copy(update={"distillation": "soft" if logits else "hard"})
    return student


def _check_kind(spec: StoreSpec, student: Student, logits: bool, name: str) -> None:
    """Refuse to read what the store does not hold: logits or, if they were not asked for, drawn classes."""
    if student.distillation == "soft" and (spec.kind == "argmax" or (logits and spec.kind == "sampled")):
        raise UsageError(
            f"open_batches: the teacher's logits for student {name}",
            expected="teacher_logits.kind topk, dense8 or dense" + " or, for drawn classes, sampled" * (not logits),
            found=spec.kind,
            do="run teacher-logits with such a kind, or open the batches "
            + ("without logits=True" if spec.kind == "sampled" else "with logits=False"),
        )


def _settings(config: Config, name: str, purpose: str) -> tuple[Training, Student, Recipe]:
    """The settings of the training loop and of distillation, and the recipe."""
    if purpose not in PURPOSES:
        raise UsageError("open_batches: purpose", expected=" or ".join(PURPOSES), found=repr(purpose))
    if purpose == "finetune":
        return config.finetune, config.finetune_student(name), config.finetune_recipe()
    student = config.student_named(name)
    return student, student, config.recipe


def _slices(settings: Training, recipe: Recipe, rank: int, world_size: int, accumulation: int) -> int:
    """Into how many slices a step is cut: ranks x accumulation."""
    groups = settings.batch_size // recipe.group_size
    if min(world_size, accumulation) < 1 or not 0 <= rank < world_size or groups % (world_size * accumulation):
        raise UsageError(
            f"open_batches: a batch of {groups} groups",
            expected="a multiple of world_size x accumulation, and a rank below world_size",
            found=f"rank {rank}, world_size {world_size}, accumulation {accumulation}",
            do="change batch_size, accumulation or the number of ranks",
        )
    return world_size * accumulation
