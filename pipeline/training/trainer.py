"""The one training loop: teacher, student and fine-tuning.

A run that is killed at any step and started again ends with the same weights: its position is a step
number, what a step holds is the plan's, and what is drawn while training (drop-path, dropout) is
seeded from (seed, step, rank). To the bit that holds on a CPU, and on a GPU whose kernels are
deterministic (pipeline.common.arithmetic). A non-finite loss stops it before a checkpoint could hold it.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pipeline.batches.batch import Batch, mixed, targets
from pipeline.batches.loader import step_loader
from pipeline.batches.transfer import DeviceToHostCopy, on_device
from pipeline.common.arithmetic import deterministic_kernels
from pipeline.common.cores import resolve_workers
from pipeline.common.distributed import Rank
from pipeline.common.errors import PipelineError
from pipeline.common.progress import print_line, progress
from pipeline.common.signals import Interrupted, SignalRecorder
from pipeline.common.streams import stream_key
from pipeline.models.build import NormalizedModel
from pipeline.models.compiling import compile_model
from pipeline.models.evaluation import predict, top_k_accuracy
from pipeline.training import checkpoint
from pipeline.training.log import Log
from pipeline.training.losses import base_loss, hard_loss, soft_loss
from pipeline.training.meters import Speed, is_loader_bound, reset_peak_memory
from pipeline.training.optim import Average, build_optimizer, build_schedule, scheduled_epoch
from pipeline.training.run import Run, TeacherOutput


def train(run: Run) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one.

    Returns:
        What the last epoch came to; `validation` names what it was validated on. The model, `run.model`, holds the
        final weights.

    Raises:
        PipelineError: a non-finite loss, damaged data, another run's checkpoint, `deterministic` where it can't be.
        Interrupted: on the first SIGTERM or Ctrl-C, after saving.
    """
    with deterministic_kernels(run.settings.deterministic):
        trainer = Trainer(run)
        trainer.resume()
        with SignalRecorder() as trainer.signals:
            return trainer.train()


STEP_VALUES = ("loss", "loss_label", "loss_distillation", "terminated", "grad_norm")


class Trainer:
    """A run's moving parts: optimizer, schedule, EMA, log."""

    def __init__(self, run: Run):
        self.run, settings = run, run.settings
        self.rank = Rank.init_process_group(run.device)
        self.parts = self.rank.world_size * settings.accumulation
        if run.plan.batch_groups % self.parts:
            raise PipelineError(
                f"{run.name}: the batch of {run.plan.batch_groups} groups",
                expected="a multiple of ranks x accumulation",
                found=f"{self.rank.world_size} x {settings.accumulation}",
                do="change batch_size, accumulation or the number of ranks",
            )
        run.model.to(run.device)
        if run.learning:
            run.model.requires_grad_(False)
        for part in run.learning:
            part.requires_grad_(True)
        if settings.channels_last:
            run.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(run.model.model, settings)
        self.schedule = build_schedule(self.optimizer, settings)
        self.ema = Average(run.model, settings.ema_decay) if settings.ema_decay else None
        self.forward: nn.Module = run.model
        if self.rank.world_size > 1:
            # without distillation head_dist gets no gradient
            unused = run.model.distilled and not run.distilled
            # no buffers: of batch norm's statistics rank 0's are kept, which no other rank's change
            self.forward = DistributedDataParallel(
                self.forward, find_unused_parameters=unused, broadcast_buffers=False
            )
        if settings.compile:
            # after DDP: the graph is split at its buckets then, so that gradients travel during the backward
            self.forward = compile_model(self.forward)
        self.step, self.epoch_loss, self.first_loss = 0, 0.0, None
        self.metrics: dict[str, Any] = {}  # of the last epoch that ended
        self.log = Log(run.folder / "log.jsonl") if self.rank.rank == 0 else None
        self.speed, self.epoch_speed = Speed(), Speed()
        self.arriving: tuple[int, dict[str, float], DeviceToHostCopy] | None = None
        self.signals = SignalRecorder()
        self.stop = self.warned = self.warned_of_chance = False
        self.loss_told = math.nan
        # once, not in every step: asking a model for its parameters, or setting its mode, costs the host half a ms
        self.learned = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.set_modes()

    def set_modes(self) -> None:
        """Training and evaluation modes of all modules as a step wants them; validation changes them."""
        self.forward.train(self.run.train_mode and not self.run.learning)
        for part in self.run.learning:
            part.train()

    def resume(self) -> None:
        run = self.run
        # rank 0 tells which: on a network file system the others may see an older one as the newest
        found = self.rank.broadcast_object(checkpoint.newest(run.folder) if self.rank.rank == 0 else None)
        if found is None:
            if self.log:
                self.log.rewind(0)  # of an attempt that ended before its first checkpoint
            return
        state = checkpoint.load(run.folder, run.checkpoint_identity, run.device, found)
        run.model.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.step, self.epoch_loss, self.first_loss = state["step"], state["epoch_loss"], state["first_loss"]
        self.metrics = state["metrics"]
        if self.log:
            self.log.rewind(self.step)
            print(f"{run.name}: goes on from step {self.step} of {run.steps}")

    def save(self) -> None:
        self.settle()
        if self.log:
            self.log.sync()
            state = {"model": self.run.model.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"epoch_loss": self.epoch_loss, "first_loss": self.first_loss, "metrics": self.metrics}
            if self.ema:
                state["ema"] = self.ema.state_dict()
            checkpoint.save(self.run.folder, self.step, self.run.checkpoint_identity, state)

    def train(self) -> dict[str, Any]:
        run, settings = self.run, self.run.settings
        slices = range(self.rank.rank * settings.accumulation, (self.rank.rank + 1) * settings.accumulation)
        steps, pin = range(self.step, run.steps), run.device.type == "cuda"
        loader = step_loader(run.plan, run.train, steps, slices, self.parts, settings.workers, pin)
        batches, saved = on_device(loader, run.device), time.monotonic()
        with progress(run.steps, run.name, "step", self.step, enabled=self.rank.rank == 0) as bar:
            while self.step < run.steps:
                values = self.train_step(batches)
                self.settle()
                told = {"lr": self.lr(), **self.speed.snapshot()} if self.logged() else {}
                self.arriving = (self.step, told, DeviceToHostCopy(values))
                self.step += 1
                bar.set_postfix_str(f"loss {self.loss_told:.3f}", refresh=False)
                bar.update()
                if self.step % run.plan.steps_per_epoch == 0:
                    self.end_epoch(self.step // run.plan.steps_per_epoch)
                if self.due(time.monotonic() - saved) or self.stop:
                    self.save()
                    saved = time.monotonic()
                if self.stop and self.step < run.steps:
                    raise Interrupted(run.name, self.step, self.signals.received)
        return self.metrics

    def due(self, seconds: float) -> bool:
        """Whether a checkpoint is, so long after the last."""
        settings = self.run.settings
        by_steps = settings.checkpoint_steps is not None and self.step % settings.checkpoint_steps == 0
        return by_steps or seconds >= 60 * settings.checkpoint_minutes or self.step == self.run.steps

    def train_step(self, batches: Iterator[Batch]) -> torch.Tensor:
        """One step of the optimizer. Returns STEP_VALUES over all ranks, float32 on the device."""
        run, settings = self.run, self.run.settings
        self.schedule.step(scheduled_epoch(run.plan.epoch(self.step)))
        self.seed()
        weight, sums = run.plan.weight(self.step), torch.zeros(3, device=run.device)
        for number in range(settings.accumulation):
            batch = self.next_batch(batches)
            with self.gradients_exchanged(number == settings.accumulation - 1):
                parts = self.loss(batch) / weight
                # DDP averages gradients over ranks; ours are shares of one sum
                (parts[0] * self.rank.world_size).backward()
            sums += parts.detach()
        # a rank that is told to end tells the others, so that all end at the same step
        flag = torch.full((1,), float(self.signals.received is not None), device=run.device)
        sums = self.rank.all_reduce(torch.cat([sums, flag]))
        norm = self.gradient_norm()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.step)
        self.speed.stepped(weight)
        self.epoch_speed.stepped(weight)
        return torch.cat([sums, norm[None]])

    def seed(self) -> None:
        """For what a step draws: the numbers of torch.manual_seed, which goes on to every device that there is."""
        number = step_seed(self.run.settings.seed, self.step, self.rank.rank)
        torch.default_generator.manual_seed(number)
        if self.run.device.type == "cuda":
            torch.cuda.manual_seed(number)  # of this process's own device

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        start = time.monotonic()
        batch = next(batches)
        for speed in (self.speed, self.epoch_speed):
            speed.rendered(batch.views, batch.decodes, time.monotonic() - start)
        return batch

    def gradients_exchanged(self, last: bool):
        """DDP exchanges gradients in a step's last slice only: they are sums until then."""
        exchanges = last or self.rank.world_size == 1
        return contextlib.nullcontext() if exchanges else cast(DistributedDataParallel, self.forward).no_sync()

    def gradient_norm(self) -> torch.Tensor:
        """Of all gradients, before they are clipped to `clip_grad`."""
        clip = self.run.settings.clip_grad
        if clip:
            return clip_grad_norm_(self.learned, clip)
        return get_total_norm([parameter.grad for parameter in self.learned if parameter.grad is not None])

    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted sums over a slice of the step: loss, and its parts from the labels and from the teacher."""
        run = self.run
        pictures = mixed(batch)
        answer: TeacherOutput | None = run.teacher(batch, pictures)
        if run.settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        weights = batch.weights.flatten()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == "bfloat16"):
            own, distilled = self.forward(pictures)
        labels = targets(batch, own.shape[1], run.settings.smoothing)
        loss = base_loss(own, labels, weights)
        how = run.distillation
        if how is None or answer is None:
            return torch.stack([loss, loss.detach(), torch.zeros_like(loss)])
        if how.distillation == "hard":
            taught = hard_loss(distilled, answer.argmax, weights)
        else:
            taught = soft_loss(distilled, cast(torch.Tensor, answer.logits), weights, how.tau, how.soft_reduction)
        return torch.stack([(1 - how.alpha) * loss + how.alpha * taught, loss.detach(), taught.detach()])

    def settle(self) -> None:
        """Take in the last step's values: they have arrived while the device computes the next step."""
        if self.arriving is None:
            return
        step, told, fetched = self.arriving
        self.arriving = None
        values: dict[str, float] = dict(zip(STEP_VALUES, fetched.get()[0].tolist(), strict=True))
        self.refuse_unsound(step, values)
        self.epoch_loss += values["loss"]
        self.loss_told = values["loss"]
        self.stop |= values.pop("terminated") > 0
        if not self.run.distilled:
            del values["loss_label"], values["loss_distillation"]
        if told and self.log:
            self.log.write("step", step, epoch=self.run.plan.epoch(step), **values, **told)

    def refuse_unsound(self, step: int, values: dict[str, float]) -> None:
        """Stop at a loss or a gradient that is not finite, or a loss that has exploded."""
        run, loss = self.run, values["loss"]
        if self.first_loss is None:
            self.first_loss = loss
        limit = math.inf
        if run.settings.stop_above:
            limit = run.settings.stop_above * max(self.first_loss, math.log(len(run.train.classes)))
        if math.isfinite(loss) and math.isfinite(values["grad_norm"]) and loss < limit:
            return
        items = run.plan.items(step)
        named = ", ".join(f"{run.train.names[i.shard]} group {i.group} view {i.view}" for i in items[:4])
        raise PipelineError(
            f"{run.name}: step {step}",
            expected="a finite loss and gradient" + f", and a loss below {limit:.3g}" * math.isfinite(limit),
            found=f"loss {loss:.4g}, gradient's norm {values['grad_norm']:.4g} over {len(items)} groups"
            f" ({named}" + ", ..." * (len(items) > 4) + ")",
            do="lower lr, set clip_grad, or use float32; the last good checkpoint is kept",
        )

    def logged(self) -> bool:
        return self.log is not None and self.step % self.run.settings.log_steps == 0

    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def end_epoch(self, epoch: int) -> None:
        self.settle()
        run, settings = self.run, self.run.settings
        metrics = {"epoch": epoch, "loss": self.epoch_loss / run.plan.steps_per_epoch, "lr": self.lr()}
        self.epoch_loss, told = 0.0, self.epoch_speed.snapshot()
        if epoch % settings.eval_epochs == 0 or epoch == settings.epochs:
            metrics |= {"validation": run.validation} | self.validate(run.model)
            if self.ema:
                metrics |= self.validate(self.ema.module, "ema_")
        self.metrics = metrics
        if self.log:
            self.log.write("epoch", self.step, **metrics, speed=told)
            if is_loader_bound(told) and not self.warned:
                self.warned = True
                print_line(warning_of(told, resolve_workers(settings.workers, run.device.type == "cuda")))
            if "validation" in metrics:
                self.tell(metrics)
        self.rank.barrier()
        for speed in (self.speed, self.epoch_speed):
            speed.snapshot()  # validation is no part of training's speed
        reset_peak_memory()

    def tell(self, metrics: dict[str, Any]) -> None:
        """A line of an evaluation, and a warning where after a third of the run nothing was learned yet."""
        run, epoch = self.run, metrics["epoch"]
        values = {key: value for key, value in metrics.items() if isinstance(value, float)}
        told = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print_line(f"{run.name}: epoch {epoch} of {run.settings.epochs}: {told}")
        chance = 1 / len(run.train.classes)
        if 3 * epoch >= run.settings.epochs and metrics["val_top1_class"] <= 1.5 * chance and not self.warned_of_chance:
            self.warned_of_chance = True
            print_line(
                f"warning: {run.name}: validation is at chance ({chance:.2%}) after a third of the run: look at the"
                " learning rate, at the views (pipeline views), and whether the classes of train and val are the same"
            )

    def validate(self, model: NormalizedModel, prefix: str = "") -> dict[str, float]:
        """Of the model as rank 0 has it: batch norm's statistics are each rank's own until here."""
        self.rank.broadcast(model.buffers())
        metrics = validate(self.run, model, prefix)
        self.set_modes()
        return metrics


def validate(run: Run, model: NormalizedModel, prefix: str = "") -> dict[str, float]:
    """Top-1 on the run's validation set, of the class head and, where it was distilled, of the mean of both."""
    logits = predict(model, run.val, run.size, run.crop, 256, run.settings.workers, run.device, run.settings.precision)
    labels = torch.from_numpy(run.val.labels())
    both = {"class": logits[0], "mean": (logits[0] + logits[1]) / 2}
    heads = both if model.distilled and run.distilled else {"class": logits[0]}
    return {f"{prefix}val_top1_{head}": top_k_accuracy(values, labels, 1) for head, values in heads.items()}


def warning_of(speed: dict[str, float], workers: int) -> str:
    sharing = f", {speed['views_per_decode']:.2f} views a decoding" if "views_per_decode" in speed else ""
    return (
        f"warning: the loader limits: {speed['wait_s'] / speed['seconds']:.0%} of the epoch was spent waiting for views"
        f" ({workers} workers{sharing}). More workers help; so do fewer accumulation steps, whose larger slices share"
        " more decodings"
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what is drawn while a step trains, so a checkpoint needs no generator's state."""
    return int.from_bytes(stream_key(seed, "step", f"{step}\x1f{rank}")[:8], "little") >> 1
