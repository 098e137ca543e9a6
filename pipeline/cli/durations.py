"""How long an experiment takes and what it writes, from rates that are measured for a few seconds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from pipeline.common.arithmetic import autocast
from pipeline.common.cores import available_cores, resolve_workers
from pipeline.common.wording import duration, size_of
from pipeline.config.schema import Config, Training
from pipeline.config.store_spec import store_spec
from pipeline.models.build import NormalizedModel, build_student, parameter_count
from pipeline.models.ensemble import build_ensemble
from pipeline.models.evaluation import multiply_adds
from pipeline.shards.conversion import FOLDER_FORMATS
from pipeline.shards.images import Undecodable, decode
from pipeline.store.estimate import equal_shards, estimate
from pipeline.views.draw import draw_view
from pipeline.views.render import render

MEASURE = 1.0
"""Seconds that each measurement takes."""
START = 10.0
"""Seconds that a stage is assumed to take before and after its work: imports, indexes, checks."""
CPU_OPERATIONS = 30_000_000_000
"""Multiply-adds per forward pass that is measured on a CPU."""
TRAINING_STATE = 2 * 3 * 4
"""Bytes per parameter: two checkpoints of the weights and Adam's two moments."""


@dataclass(frozen=True)
class Rates:
    """Seconds per image."""

    decode: float
    """Reading and decoding an image, on one core."""
    render: float
    """Rendering a view of a decoded image, on one core."""
    forward: dict[str, float]
    """The forward pass by model (teacher, or a student's name), on the device."""
    step: dict[str, float]
    """The same for a training step: forward pass, backward pass and update."""
    parameters: dict[str, int]


def measure(
    config: Config, files: Sequence[Path | BytesIO], classes: int, device: torch.device, teacher_trained: bool = True
) -> Rates:
    """Measure every model of the experiment, decoding and rendering, each for about `MEASURE` seconds.

    Args:
        files: encoded images, to decode and to render views of.
        teacher_trained: measure the teacher's training step too.
    """
    models = {"teacher": build_ensemble(config.teacher, classes)}
    models |= {
        name: build_student(config.student_named(name), config.recipe, classes, config.recipe.size)
        for name in config.students
    }
    decoding, rendering = _measure_views(config, files, MEASURE)
    forward, step = {}, {}
    for name, model in models.items():
        teacher = name == "teacher"
        size = config.teacher_size("train-student") if teacher else config.recipe.size
        batch = _batch_size(model, size, config.student.batch_size, device)
        pictures = torch.zeros(batch, 3, size, size, device=device)
        training = (config.teacher if teacher else config.student_named(name)).precision
        predict, train = _calls(model.to(device), pictures, config.teacher_logits.precision if teacher else training, training)
        forward[name] = _seconds(predict, device, MEASURE) / batch
        if teacher_trained or not teacher:
            step[name] = _seconds(train, device, MEASURE) / batch
        model.cpu()
    return Rates(decoding, rendering, forward, step, {name: parameter_count(model) for name, model in models.items()})


def _batch_size(model: NormalizedModel, size: int, limit: int, device: torch.device) -> int:
    """A batch that is typical of a GPU, or that takes a CPU about a second."""
    if device.type == "cuda":
        return min(limit, 64)
    return max(min(limit, 32, CPU_OPERATIONS // multiply_adds(model, size)), 2)


def _calls(
    model: NormalizedModel, pictures: torch.Tensor, predicting: str, training: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass, and a training step, each in its precision."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=True)

    def forward() -> None:
        model.eval()
        with torch.no_grad(), autocast(pictures.device.type, predicting):
            model(pictures)

    def step() -> None:
        model.train()
        with autocast(pictures.device.type, training):
            first, second = model(pictures)
        (first.float().logsumexp(1).sum() + second.float().logsumexp(1).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward, step


def _seconds(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Median duration of a call, after one to warm up."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def _measure_views(config: Config, files: Sequence[Path | BytesIO], seconds: float) -> tuple[float, float]:
    """Seconds to read and decode an image, and to render a view of it; means, since images differ."""
    decoding, rendering, end = [], [], time.perf_counter() + seconds
    for number, file in enumerate(files):
        start = time.perf_counter()
        try:
            image = decode(file.getvalue() if isinstance(file, BytesIO) else file.read_bytes(), config.data.max_pixels, FOLDER_FORMATS)
        except (OSError, Undecodable):
            continue
        decoded = time.perf_counter()
        for view in range(3):
            params = draw_view(config.recipe, str(number), view, image.shape[1], image.shape[0])
            render(image, params, config.recipe)
        decoding.append(decoded - start)
        rendering.append((time.perf_counter() - decoded) / 3)
        if time.perf_counter() > end and len(decoding) > 2:
            break
    return float(np.mean(decoding or [0.0])), float(np.mean(rendering or [0.0]))


@dataclass(frozen=True)
class Hardware:
    """What the durations of stages depend on besides rates."""

    cores: int
    gpu: bool

    def per_view(self, model: float, view: float, workers: int | None) -> float:
        """Seconds per view, of the model on all cores or a GPU and of rendering on one core.

        Loader workers render beside the model, and on a CPU take their cores from it.
        """
        workers = resolve_workers(workers, self.gpu)
        if not workers:
            return model + view
        left = max(self.cores - workers, 1)
        return max(model if self.gpu else model * self.cores / left, view / workers)

    def training(self, config: Config, section: Training, rates: Rates, step: float, images: int) -> float:
        """Seconds of a training whose step takes `step` seconds per image."""
        view = rates.render + rates.decode / config.recipe.repeats
        return START + images * section.epochs * self.per_view(step, view, section.workers)

    def labelling(self, config: Config, rates: Rates, images: int, views: int) -> float:
        """Seconds that the teacher takes for a store."""
        view = rates.render + rates.decode / min(config.recipe.block, views)
        return START + images * views * self.per_view(rates.forward["teacher"], view, config.teacher_logits.workers)


def stage_seconds(config: Config, rates: Rates, images: int, val_images: int, machine: Hardware) -> dict[str, float]:
    """Seconds per stage that `dvc repro` runs; fine-tuning is not included."""
    evaluation = config.evaluate
    result = {"prepare": START + (images + val_images) * 2 * rates.decode / machine.cores}
    forwards = {
        name: val_images * machine.per_view(each, rates.decode + rates.render, evaluation.workers)
        for name, each in rates.forward.items()
        if name != "teacher" or config.needs_teacher("train-student")
    }
    if config.needs_teacher("train-student"):
        step = rates.step.get("teacher")  # None: its weights are used as they are
        trained = START + forwards["teacher"] if step is None else machine.training(config, config.teacher, rates, step, images)
        result |= {"teacher": trained, "teacher-logits": machine.labelling(config, rates, images, config.teacher_logits.views)}
    for name in config.students:
        section = config.student_named(name)
        result[f"train-student {name}"] = machine.training(config, section, rates, rates.step[name], images)
    result["evaluate"] = 2 * START + sum(forwards.values()) + evaluation.throughput_seconds * len(forwards)
    return result


def bytes_written(config: Config, rates: Rates, images: int, classes: int, image_bytes: int) -> dict[str, int]:
    """Bytes per kind of file below `work`."""
    store = estimate(store_spec(config, "train-student"), equal_shards(images, config.data.shard_samples), classes)
    return {
        "shards": image_bytes,
        "store": store.bytes if config.needs_store("train-student") else 0,
        "checkpoints": TRAINING_STATE * sum(rates.parameters.values()),
    }


def describe(seconds: dict[str, float], sizes: dict[str, int], device: torch.device) -> str:
    """The estimate as text."""
    lines = [f"  {name:<24}{duration(value)}" for name, value in seconds.items()]
    total = duration(sum(seconds.values()))
    parts = ", ".join(f"{name} {size_of(size)}" for name, size in sizes.items())
    return "\n".join(
        [
            f"estimate, from rates measured now on {device.type} with {available_cores()} cores, and {START:.0f} s around"
            " each stage:",
            *lines,
            f"  {'in all':<24}{total}",
            f"  {'disk':<24}{size_of(sum(sizes.values()))}: {parts}",
        ]
    )
