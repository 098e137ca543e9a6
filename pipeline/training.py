"""The one training loop: teacher, student and fine-tuning.

A run that is killed at any step and started again ends with the same weights: its position is a step
number, what a step holds is the plan's, and what is drawn while training (drop-path, dropout) is
seeded from (seed, step, rank). A non-finite loss stops it before a checkpoint could hold it.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pipeline import checkpoint
from pipeline.config import Student, Training
from pipeline.errors import PipelineError
from pipeline.evaluation import predict, top_k_accuracy
from pipeline.files import replacing
from pipeline.loader import Groups, mixed, step_loader, targets
from pipeline.losses import base_loss, hard_loss, soft_loss
from pipeline.models import (
    Normalised,
    load_weights,
    parameter_count,
    read_weights,
    save_weights,
)
from pipeline.plan import Plan
from pipeline.recipe import stream_key
from pipeline.runlog import Log
from pipeline.shards import Index
from pipeline.strict import fingerprint
from pipeline.teaching import Answer, NoTeacher

TRAINING_VERSION = 1  # bump on any change of what a step computes, or finished runs would be taken for it


class Interrupted(PipelineError):
    """SIGTERM came; a checkpoint was saved and the same command goes on from it."""

    exit_code = 143


@dataclass
class Run:
    """One training run."""

    name: str
    folder: Path
    """Of its state: checkpoints and log.jsonl. Named by `fingerprint`, or it is another run's."""
    fingerprint: str
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
    identity: dict[str, Any] = field(default_factory=dict)
    """What the fingerprint is of: see `run_fingerprint`."""


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started; alone otherwise."""

    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: torch.device) -> "Rank":
        """Join the process group where torchrun's environment names one."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", "0")), world)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def run_fingerprint(identity: dict[str, Any]) -> str:
    """Names a run by all that its weights depend on, this module's version too."""
    return fingerprint({**identity, "training_version": TRAINING_VERSION})


NAMED_BY = ("teacher_settings", "student", "finetune", "recipe", "index")


def named_by(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that a configuration and its index tell without any weights."""
    return {key: identity[key] for key in NAMED_BY if key in identity}


def describe_run(run: Run) -> str:
    """What a run would do: images, steps, views, folder."""
    plan, epochs = run.plan, run.settings.epochs
    steps, wanted = epochs * plan.steps_per_epoch, plan.views_seen(epochs)
    text = (
        f"{run.name}: {len(run.train):,} images at {run.size} px, {epochs} epochs x {plan.steps_per_epoch:,} steps"
        f" of {plan.batch_groups} groups = {steps:,} steps; {parameter_count(run.model.model):,} parameters\n"
        f"  state: {run.folder}"
    )
    if wanted > plan.views:
        text += f"\n  {wanted} views wanted, {plan.views} stored: each comes round {wanted / plan.views:.1f} times"
    return text


def train(run: Run) -> dict[str, float]:
    """Train to the end, from the newest checkpoint if there is one.

    Returns:
        The last epoch's metrics. The model, `run.model`, holds the final weights.

    Raises:
        PipelineError: a non-finite loss, damaged data, another run's checkpoint.
        Interrupted: on SIGTERM, after saving.
    """
    trainer = Trainer(run)
    trainer.resume()
    with _Termination() as terminated:
        return trainer.train(terminated)


def complete(run: Run) -> None:
    """Train to the end unless that was done before; `run.model` holds the final weights then.

    They stay with the run's state, so coming back to an earlier configuration costs nothing.
    """
    final, rank = run.folder / "final.safetensors", Rank.start(run.device)
    rank.barrier()  # so that all ranks see the same
    if not final.exists():
        if rank.rank == 0:
            with replacing(run.folder / "run.json") as temporary:
                temporary.write_text(json.dumps({"name": run.name} | named_by(run.identity), indent=1) + "\n")
        train(run)
        rank.barrier()
        if rank.rank == 0:
            with replacing(final) as temporary:
                save_weights(temporary, run.model.model)
        return
    load_weights(run.model.model, read_weights(final), str(final))


class Trainer:
    """A run's moving parts: optimizer, schedule, EMA, log."""

    def __init__(self, run: Run):
        self.run, settings = run, run.settings
        self.rank = Rank.start(run.device)
        self.parts = self.rank.world * settings.accumulation
        if run.plan.batch_groups % self.parts:
            raise PipelineError(
                f"{run.name}: the batch of {run.plan.batch_groups} groups",
                expected="a multiple of ranks x accumulation",
                found=f"{self.rank.world} x {settings.accumulation}",
                do="change batch_size, accumulation or the number of ranks",
            )
        run.model.to(run.device)
        if settings.channels_last:
            run.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(run.model.model, settings)
        self.schedule = build_schedule(self.optimizer, settings)
        self.ema = ModelEmaV3(run.model, decay=settings.ema_decay) if settings.ema_decay else None
        self.forward: nn.Module = torch.compile(run.model) if settings.compile else run.model
        if self.rank.world > 1:
            # an undistilled model with two heads leaves head_dist without a gradient
            self.forward = DistributedDataParallel(self.forward, find_unused_parameters=run.model.distilled)
        self.steps = settings.epochs * run.plan.steps_per_epoch
        self.step = 0
        self.log = Log(run.folder / "log.jsonl") if self.rank.rank == 0 else None
        self.epoch_loss = torch.zeros((), device=run.device)
        self.unchecked: tuple[int, torch.Tensor] | None = None

    def resume(self) -> None:
        run = self.run
        state = checkpoint.load(run.folder, run.fingerprint, run.device)
        if state is None:
            return
        run.model.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.epoch_loss = state["epoch_loss"]
        self.step = state["step"]
        if self.log:
            self.log.rewind(self.step)
            print(f"{run.name}: goes on from step {self.step} of {self.steps}")

    def save(self) -> None:
        self.refuse_non_finite()
        if self.rank.rank == 0:
            state = {"model": self.run.model.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state["epoch_loss"] = self.epoch_loss
            if self.ema:
                state["ema"] = self.ema.state_dict()
            checkpoint.save(self.run.folder, self.step, self.run.fingerprint, state)

    def train(self, terminated: Callable[[], bool]) -> dict[str, float]:
        run, settings = self.run, self.run.settings
        per_epoch = run.plan.steps_per_epoch
        slices = range(self.rank.rank * settings.accumulation, (self.rank.rank + 1) * settings.accumulation)
        pin = run.device.type == "cuda"
        batches = iter(
            step_loader(run.plan, run.train, range(self.step, self.steps), slices, self.parts, settings.workers, pin)
        )
        bar = tqdm(
            total=self.steps, initial=self.step, desc=run.name, unit="step", disable=self.rank.rank != 0, mininterval=1
        )
        saved, metrics = time.monotonic(), {}
        while self.step < self.steps:
            loss = self.train_step(batches)
            self.refuse_non_finite()
            self.unchecked = (self.step, loss)
            self.epoch_loss += loss
            if self.log and (self.step % settings.log_steps == 0 or settings.log_steps == 1):
                self.log.write("step", self.step, epoch=self.step // per_epoch, loss=loss.item(), lr=self.lr())
            self.step += 1
            bar.update()
            if self.step % per_epoch == 0:
                metrics = self.end_epoch(self.step // per_epoch)
            due = time.monotonic() - saved >= 60 * settings.checkpoint_minutes
            if due or terminated() or self.step == self.steps:
                self.save()
                saved = time.monotonic()
            if terminated() and self.step < self.steps:
                raise Interrupted(
                    f"{run.name}: ended by SIGTERM at step {self.step}; the same command goes on from there"
                )
        bar.close()
        return metrics

    def train_step(self, batches) -> torch.Tensor:
        """One step of the optimizer. Returns the step's loss, over all ranks."""
        run, settings = self.run, self.run.settings
        self.schedule.step(max(self.step // run.plan.steps_per_epoch - 1, 0))  # DeiT's lags an epoch
        torch.manual_seed(step_seed(settings.seed, self.step, self.rank.rank))
        self.forward.train(run.train_mode)
        weight = run.plan.weight(self.step)
        total = torch.zeros((), device=run.device)
        for _ in range(settings.accumulation):
            groups = next(batches)
            loss = self.loss(groups.to(run.device)) / weight
            # DDP averages gradients over ranks; ours are shares of one sum
            (loss * self.rank.world).backward()
            total += loss.detach()
        if settings.clip_grad:
            nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(run.model, step=self.step)
        if self.rank.world > 1:
            dist.all_reduce(total)
        return total

    def loss(self, groups: Groups) -> torch.Tensor:
        """The weighted sum over a slice of the step."""
        run, how = self.run, self.run.distillation
        pictures = mixed(groups)
        answer = run.teacher(groups, pictures)
        if run.settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        weights = groups.weights.flatten()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == "bfloat16"):
            own, distilled = self.forward(pictures)
        labels = targets(groups, own.shape[1], run.settings.smoothing)
        loss = base_loss(own, labels, weights)
        if how is None or how.distillation == "none" or answer is None:
            return loss
        if how.distillation == "hard":
            taught = hard_loss(distilled, answer.argmax, weights)
        else:
            taught = soft_loss(distilled, answer.logits, weights, how.tau, how.soft_reduction)
        return (1 - how.alpha) * loss + how.alpha * taught

    def refuse_non_finite(self) -> None:
        """Look at the last step's loss, which has arrived by now: no waiting for the device."""
        if self.unchecked is None:
            return
        step, loss = self.unchecked
        self.unchecked = None
        if not math.isfinite(loss.item()):
            items = self.run.plan.items(step)
            named = ", ".join(f"{self.run.train.names[i.shard]} group {i.group} view {i.view}" for i in items[:4])
            raise PipelineError(
                f"{self.run.name}: step {step}",
                expected="a finite loss",
                found=f"{loss.item()} over {len(items)} groups ({named}, ...)",
                do="lower lr, set clip_grad, or use float32; the last good checkpoint is kept",
            )

    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def end_epoch(self, epoch: int) -> dict[str, float]:
        settings = self.run.settings
        metrics = {"loss": self.epoch_loss.item() / self.run.plan.steps_per_epoch, "lr": self.lr()}
        self.epoch_loss.zero_()
        if epoch % settings.eval_epochs == 0 or epoch == settings.epochs:
            if self.rank.rank == 0:
                metrics |= self.validate(self.run.model, "")
                if self.ema:
                    metrics |= self.validate(self.ema.module, "ema_")
        if self.log:
            self.log.write("epoch", self.step, epoch=epoch, **metrics)
        self.rank.barrier()
        return metrics

    def validate(self, model: Normalised, prefix: str) -> dict[str, float]:
        run = self.run
        logits = predict(
            model, run.val, run.size, run.crop, 256, run.settings.workers, run.device, run.settings.precision
        )
        labels = torch.from_numpy(run.val.labels())
        both = {"class": logits[0], "mean": (logits[0] + logits[1]) / 2}
        taught = run.distillation is not None and run.distillation.distillation != "none"
        heads = both if model.distilled and taught else {"class": logits[0]}
        return {f"{prefix}val_top1_{head}": top_k_accuracy(values, labels, 1) for head, values in heads.items()}


def build_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW (eps 1e-8, betas 0.9, 0.999) or SGD; no decay of 1-D weights and `no_weight_decay()`.

    The rate is lr * batch_size / 512 (paper, section 6).
    """
    options: dict[str, Any] = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {"eps": 1e-8}
    return create_optimizer_v2(
        model,
        opt=settings.optimizer,
        lr=settings.lr * settings.batch_size / 512,
        weight_decay=settings.weight_decay,
        **options,
    )


def build_schedule(optimizer: torch.optim.Optimizer, settings: Training) -> CosineLRScheduler:
    """timm's cosine, stepped per epoch; warm-up counts into the cosine's epochs, as in DeiT."""
    return CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs,
        lr_min=settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
        warmup_prefix=False,
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what is drawn while a step trains, so a checkpoint needs no generator's state."""
    return int.from_bytes(stream_key(seed, "step", f"{step}\x1f{rank}")[:8], "little") >> 1


class _Termination:
    """Notes SIGTERM instead of dying of it, so that a checkpoint can be saved."""

    def __enter__(self) -> Callable[[], bool]:
        self.came = False
        self.previous = signal.signal(signal.SIGTERM, self._note)
        return lambda: self.came

    def _note(self, *_) -> None:
        self.came = True

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self.previous)
