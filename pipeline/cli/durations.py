"""How long an experiment takes and what it writes, from rates that are measured for a few seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from pipeline.common.arithmetic import autocast
from pipeline.common.cores import available_cores, resolve_workers
from pipeline.config.schema import Config, Training
from pipeline.config.store_spec import store_spec
from pipeline.models.build import NormalizedModel, build_student, parameter_count
from pipeline.models.ensemble import build_ensemble
from pipeline.shards.conversion import FOLDER_FORMATS
from pipeline.shards.images import Undecodable, decode
from pipeline.store.estimate import equal_shards, estimate
from pipeline.views.draw import draw_view
from pipeline.views.render import render

MEASURE = 1.0
"""Seconds that each measurement takes."""
START = 10.0
"""Seconds that a stage is assumed to take before and after its work: imports, indexes, checks."""
TRAINING_STATE = 2 * 3 * 4
"""Bytes per parameter: two checkpoints of the weights and Adam's two moments."""


@dataclass(frozen=True)
class Rates:
    """Seconds per image."""

    decode: float
    """On one core."""
    render: float
    """On one core, per view of a decoded image."""
    forward: dict[str, float]
    """By model (teacher, or a student's name), on the device."""
    step: dict[str, float]
    """The same for forward, backward and update."""
    parameters: dict[str, int]


def measure(config: Config, files: list[Path | BytesIO], classes: int, device: torch.device) -> Rates:
    """Measure every model of the experiment, decoding and rendering, each for about `MEASURE` seconds."""
    models = {"teacher": build_ensemble(config.teacher, classes)}
    models |= {
        name: build_student(config.student_named(name), config.recipe, classes, config.recipe.size)
        for name in config.students
    }
    decoding, rendering = _measure_views(config, files, MEASURE)
    batch = min(config.student.batch_size, 32)
    pictures = torch.zeros(batch, 3, config.recipe.size, config.recipe.size, device=device)
    forward, step = {}, {}
    for name, model in models.items():
        precision = (config.teacher if name == "teacher" else config.student).precision
        forward[name], step[name] = (
            _seconds(call, device, MEASURE) / batch for call in _calls(model.to(device), pictures, precision)
        )
    return Rates(decoding, rendering, forward, step, {name: parameter_count(model) for name, model in models.items()})


def _calls(
    model: NormalizedModel, pictures: torch.Tensor, precision: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass, and a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=True)

    def forward() -> None:
        model.eval()
        with torch.no_grad(), autocast(pictures.device.type, precision):
            model(pictures)

    def step() -> None:
        model.train()
        with autocast(pictures.device.type, precision):
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


def _measure_views(config: Config, files: list[Path | BytesIO], seconds: float) -> tuple[float, float]:
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


def stage_seconds(config: Config, rates: Rates, images: int, val_images: int, cores: int, gpu: bool) -> dict[str, float]:
    """Seconds per stage, on a machine with `cores`."""

    def combined(model: float, views: float, workers: int | None) -> float:
        """Seconds per view, of the model on all cores or a GPU and of rendering on one core.

        Loader workers render beside the model, and on a CPU take their cores from it.
        """
        workers = resolve_workers(workers, gpu)
        if not workers:
            return model + views
        left = max(cores - workers, 1)
        return max(model if gpu else model * cores / left, views / workers)

    def training(section: Training, step: float) -> float:
        view = rates.render + rates.decode / config.recipe.repeats
        return START + images * section.epochs * combined(step, view, section.workers)

    views, evaluation = config.teacher_logits.views, config.evaluate
    view = rates.render + rates.decode / min(config.recipe.block, views)
    labelling = combined(rates.forward["teacher"], view, config.teacher_logits.workers)
    result = {
        "prepare": START + (images + val_images) * 2 * rates.decode / cores,
        "teacher": training(config.teacher, rates.step["teacher"]),
        "teacher-logits": START + images * views * labelling,
    }
    for name in config.students:
        result[f"train-student {name}"] = training(config.student_named(name), rates.step[name])
    forwards = (combined(each, rates.decode + rates.render, evaluation.workers) for each in rates.forward.values())
    result["evaluate"] = 2 * START + val_images * sum(forwards) + evaluation.throughput_seconds * len(rates.forward)
    return result


def bytes_written(config: Config, rates: Rates, images: int, classes: int, image_bytes: int) -> dict[str, int]:
    """Bytes per kind of file below `work`."""
    store = estimate(store_spec(config, "train-student"), equal_shards(images, config.data.shard_samples), classes)
    return {
        "shards": image_bytes,
        "store": store.bytes,
        "checkpoints": TRAINING_STATE * sum(rates.parameters.values()),
    }


def describe(seconds: dict[str, float], sizes: dict[str, int], device: torch.device) -> str:
    """The estimate as text."""
    lines = [f"  {name:<24}{_duration(value)}" for name, value in seconds.items()]
    total = _duration(sum(seconds.values()))
    parts = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.items())
    return "\n".join(
        [
            f"estimate, from rates measured now on {device.type} with {available_cores()} cores, and {START:.0f} s around"
            " each stage:",
            *lines,
            f"  {'in all':<24}{total}",
            f"  {'disk':<24}{sum(sizes.values()) / 1e6:,.0f} MB: {parts}",
        ]
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
