"""The one training loop: teacher, student and fine-tuning.

A run that is killed at any step and started again ends with the same weights: its position is a step
number, the plan determines the contents of a step, and random draws of the model (drop-path, dropout) are
seeded from (seed, step, rank). The weights are bit-identical on a CPU, and on a GPU with deterministic
kernels (pipeline.common.arithmetic). A non-finite loss stops the run before it reaches a checkpoint.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pipeline.batches.batch import Batch, mixed, targets
from pipeline.batches.loader import step_loader
from pipeline.batches.transfer import DeviceToHostCopy, on_device
from pipeline.common.arithmetic import autocast, deterministic_kernels
from pipeline.common.distributed import Rank
from pipeline.common.errors import PipelineError
from pipeline.common.progress import progress
from pipeline.common.signals import Interrupted, SignalRecorder
from pipeline.models.build import NormalizedModel
from pipeline.training import checkpoint
from pipeline.training.losses import distillation_losses
from pipeline.training.meters import Meters, reset_peak_memory
from pipeline.training.monitoring import check_step, validate
from pipeline.training.optim import ModelEma, add_momentum_buffers, build_optimizer, build_schedule, scheduled_epoch
from pipeline.training.parallel import parallel_model, set_trainable
from pipeline.training.recorder import Recorder
from pipeline.training.run import Run
from pipeline.training.scaling import SCALER_VALUES, LossScaler
from pipeline.training.seeding import seed_step


def train(run: Run) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one; `run.model` then holds the final weights.

    Returns:
        Metrics of the last epoch; `validation` names the images and the crop that they were computed on.

    Raises:
        PipelineError: a non-finite loss, damaged data, another run's checkpoint, or an operation without a
            deterministic kernel under `deterministic`.
        Interrupted: on the first SIGTERM or Ctrl-C, after saving a checkpoint.
    """
    with deterministic_kernels(run.settings.deterministic):
        trainer = Trainer(run)
        trainer.resume()
        with SignalRecorder() as trainer.signals, contextlib.closing(trainer.recorder):
            return trainer.train()


STEP_VALUES = ("loss", "loss_label", "loss_distillation", "terminated", "grad_norm")
"""What a step returns; in float16 SCALER_VALUES follow."""


class PendingValues(NamedTuple):
    """A step's values on their way to the host."""

    step: int
    log_fields: dict[str, float]
    """What its line of the log holds besides; empty: the step is not logged."""
    copy: DeviceToHostCopy


class Trainer:
    """The mutable state of a run: optimizer, schedule, EMA, loss scale, position, log."""

    def __init__(self, run: Run):
        self.run, settings = run, run.settings
        self.rank = Rank.current(run.device)
        self.slices = self.rank.world_size * settings.accumulation
        if run.plan.batch_groups % self.slices:
            raise PipelineError(
                f"{run.name}: the batch of {run.plan.batch_groups} groups",
                expected="a multiple of ranks x accumulation",
                found=f"{self.rank.world_size} x {settings.accumulation}",
                do="change batch_size, accumulation or the number of ranks",
            )
        run.model.to(run.device)
        if settings.channels_last:
            run.model.to(memory_format=torch.channels_last)
        set_trainable(run.model, run.trained_modules(run.steps))
        self.optimizer = build_optimizer(run.model.model, settings)
        self.schedule = build_schedule(self.optimizer, settings)
        self.ema = ModelEma(run.model, settings.ema_decay) if settings.ema_decay else None
        self.scaler = LossScaler(run.device) if settings.precision == "float16" else None
        self.step, self.epoch_loss, self.first_loss = 0, 0.0, None
        self.metrics: dict[str, Any] = {}  # of the last completed epoch
        self.recorder = Recorder(run, self.rank.rank)
        self.meters = Meters()
        self.pending: PendingValues | None = None
        self.signals = SignalRecorder()
        self.stop, self.last_loss = False, math.nan
        self.select_modules()

    def select_modules(self) -> None:
        """Train the modules that this step trains; the others are frozen."""
        self.trained = self.run.trained_modules(self.step)
        if self.scaler or (self.run.thaw_step and self.step >= self.run.thaw_step):
            add_momentum_buffers(self.optimizer)
        set_trainable(self.run.model, self.trained)
        self.wrapped_model = parallel_model(self.run, self.rank)
        # listed once: asking a model for its parameters, or setting its mode, takes the host half a ms
        self.parameters = [parameter for parameter in self.run.model.parameters() if parameter.requires_grad]
        self.set_modes()

    def set_modes(self) -> None:
        """Set every module's mode for a training step; validation changes them."""
        self.wrapped_model.train(self.run.train_mode and not self.trained)
        for module in self.trained:
            module.train()

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        run = self.run
        # rank 0 says which: on a network file system the others may see an older one as the newest
        newest = self.rank.broadcast_object(checkpoint.newest(run.folder) if self.rank.rank == 0 else None)
        if newest is None:
            self.recorder.start(0)  # an earlier attempt may have ended before its first checkpoint
            return
        state = checkpoint.load(run.folder, run.checkpoint_identity, run.device, newest)
        run.model.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch_loss, self.first_loss = state["step"], state["epoch_loss"], state["first_loss"]
        self.metrics = state["metrics"]
        if "speed" in state:  # not in checkpoints of earlier versions
            self.meters.epoch.load_state_dict(state["speed"])
        if self.trained != run.trained_modules(self.step):
            self.select_modules()
        self.recorder.start(self.step)

    def save(self) -> None:
        """Write a checkpoint, on rank 0."""
        self.collect_values()
        if self.rank.rank == 0:
            self.recorder.sync()
            state = {"model": self.run.model.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"epoch_loss": self.epoch_loss, "first_loss": self.first_loss, "metrics": self.metrics}
            state["speed"] = self.meters.epoch.state_dict()
            parts = {"ema": self.ema, "scaler": self.scaler}
            state |= {name: part.state_dict() for name, part in parts.items() if part}
            checkpoint.save(self.run.folder, self.step, self.run.checkpoint_identity, state)

    def train(self) -> dict[str, Any]:
        """Run the remaining steps; see `train`."""
        run, settings = self.run, self.run.settings
        own = range(self.rank.rank * settings.accumulation, (self.rank.rank + 1) * settings.accumulation)
        steps, pin = range(self.step, run.steps), run.device.type == "cuda"
        loader = step_loader(run.plan, run.train, steps, own, self.slices, settings.workers, pin)
        batches, saved = on_device(loader, run.device), time.monotonic()
        with progress(run.steps, run.name, "step", self.step, enabled=self.rank.rank == 0) as bar:
            while self.step < run.steps:
                values = self.train_step(batches)
                self.collect_values()
                logged = self.rank.rank == 0 and self.step % settings.log_steps == 0
                fields = {"lr": self.lr(), **self.meters.steps.snapshot()} if logged else {}
                self.pending = PendingValues(self.step, fields, DeviceToHostCopy(values))
                self.step += 1
                bar.set_postfix_str(f"loss {self.last_loss:.3f}", refresh=False)
                bar.update()
                if self.step % run.plan.steps_per_epoch == 0:
                    self.end_epoch(self.step // run.plan.steps_per_epoch)
                if self.step == run.thaw_step:
                    self.select_modules()
                stop = self.stop  # the same on all ranks; saving, which may be due on one alone, collects one more step
                if self.checkpoint_due(time.monotonic() - saved) or stop:
                    self.save()
                    stop, saved = self.stop if self.rank.world_size == 1 else stop, time.monotonic()
                if stop and self.step < run.steps:
                    raise Interrupted(run.name, self.step, self.signals.received)
        return self.metrics

    def checkpoint_due(self, seconds: float) -> bool:
        """Whether to save a checkpoint now, `seconds` after the last."""
        settings = self.run.settings
        by_steps = settings.checkpoint_steps is not None and self.step % settings.checkpoint_steps == 0
        return by_steps or seconds >= 60 * settings.checkpoint_minutes or self.step == self.run.steps

    def train_step(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Take one step of the optimizer. Returns its values over all ranks, see STEP_VALUES, float32 on the device."""
        run, settings = self.run, self.run.settings
        self.schedule.step(scheduled_epoch(run.plan.epoch(self.step)))
        seed_step(settings.seed, self.step, self.rank.rank, run.device)
        weight, sums = run.plan.weight(self.step), torch.zeros(3, device=run.device)
        for number in range(settings.accumulation):
            batch = self.next_batch(batches)
            with self.gradient_sync(number == settings.accumulation - 1):
                losses = self.loss(batch) / weight
                # DDP averages gradients over ranks; each rank's loss is its share of one sum
                loss = losses[0] * self.rank.world_size
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            sums += losses.detach()
        # a rank that received a signal informs the others, so that all stop after the same step
        flag = torch.full((1,), float(self.signals.received is not None), device=run.device)
        sums = self.rank.all_reduce(torch.cat([sums, flag]))
        values = [sums, *self.update_weights()]
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.step)
        self.meters.add_step(weight)
        return torch.cat(values)

    def update_weights(self) -> list[torch.Tensor]:
        """Step the optimizer. Returns the gradient norm and, in float16, SCALER_VALUES."""
        if not self.scaler:
            norm = self.gradient_norm()
            self.optimizer.step()
            return [norm[None]]
        self.scaler.unscale(self.optimizer)
        norm = self.gradient_norm()
        return [norm[None], self.scaler.step(self.optimizer)]

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next slice; the time spent waiting for it is recorded."""
        start = time.monotonic()
        batch = next(batches)
        self.meters.add_batch(batch.views, batch.decodes, time.monotonic() - start)
        return batch

    def gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Let DDP reduce gradients in a step's last slice only; until then they accumulate locally."""
        exchanges = last or self.rank.world_size == 1
        return contextlib.nullcontext() if exchanges else cast(DistributedDataParallel, self.wrapped_model).no_sync()

    def gradient_norm(self) -> torch.Tensor:
        """Clip gradients to `clip_grad`, where it is set; returns the total norm before."""
        clip = self.run.settings.clip_grad
        if clip:
            return clip_grad_norm_(self.parameters, clip)
        return get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def loss(self, batch: Batch) -> torch.Tensor:
        """The losses of one slice of the step, see `distillation_losses`."""
        run = self.run
        pictures = mixed(batch)
        predictions = run.teacher(batch, pictures)
        if run.settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        weights = batch.weights.flatten()
        with autocast(run.device.type, run.settings.precision):
            logits, distilled = self.wrapped_model(pictures)
        labels = targets(batch, logits.shape[1], run.settings.smoothing)
        return distillation_losses(logits, distilled, labels, weights, predictions, run.distillation)

    def collect_values(self) -> None:
        """Check and log the last step's values, which were copied while the device computes the next step."""
        if self.pending is None:
            return
        (step, log_fields, copy), self.pending = self.pending, None
        names = STEP_VALUES + SCALER_VALUES * bool(self.scaler)
        values: dict[str, float] = dict(zip(names, copy.get()[0].tolist(), strict=True))
        if self.first_loss is None:
            self.first_loss = values["loss"]
        if self.scaler:
            self.scaler.record(self.run, step, values)
        check_step(self.run, step, values["loss"], values.get("grad_norm", 0.0), self.first_loss)
        self.epoch_loss += values["loss"]
        self.last_loss = values["loss"]
        self.stop |= values.pop("terminated") > 0
        if not self.run.distilled:
            del values["loss_label"], values["loss_distillation"]
        if log_fields:
            self.recorder.write_step(step, values | log_fields)

    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def end_epoch(self, epoch: int) -> None:
        """Validate where it is due, and log."""
        self.collect_values()
        run, settings = self.run, self.run.settings
        metrics = {"epoch": epoch, "loss": self.epoch_loss / run.plan.steps_per_epoch, "lr": self.lr()}
        self.epoch_loss, speed = 0.0, self.meters.epoch.snapshot()
        if epoch % settings.eval_epochs == 0 or epoch == settings.epochs:
            metrics |= {"validation": run.validation} | self.validate(run.model)
            if self.ema:
                metrics |= self.validate(self.ema.module, "ema_")
        self.metrics = metrics
        self.recorder.write_epoch(self.step, metrics, speed)
        self.rank.barrier()
        self.meters.restart()  # the time of validation does not count
        reset_peak_memory()

    def validate(self, model: NormalizedModel, prefix: str = "") -> dict[str, float]:
        """Metrics of the model as rank 0 has it: until here, each rank has its own statistics of batch norm."""
        self.rank.broadcast(model.buffers())
        metrics = validate(self.run, model, prefix)
        self.set_modes()
        return metrics
