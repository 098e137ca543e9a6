"""`pipeline doctor`: what on this machine will fail, or slow the experiment down."""

import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from tabulate import tabulate

from pipeline.cli.machine import (
    Finding,
    Level,
    check_cores,
    check_decoders,
    check_dvc,
    check_gpus,
    check_versions,
    existing_parent,
    fastest_precision,
    free_bytes,
    measure_disk,
)
from pipeline.cli.scan import read_json
from pipeline.common.cores import needed_open_files, resolve_workers
from pipeline.common.errors import PipelineError
from pipeline.common.wording import count_of, size_of
from pipeline.config.params import load_config
from pipeline.config.paths import index_path, local_work, student_folder, teacher_folder
from pipeline.config.schema import PURPOSES, Config
from pipeline.config.store_spec import store_spec
from pipeline.models.hub import missing_weights
from pipeline.shards.cache import GB, is_remote
from pipeline.shards.index import Index
from pipeline.shards.sources import list_splits
from pipeline.store.estimate import equal_shards, estimate

SLOW_DISK = 50e6
"""Reading speed, in bytes per second, below which a warning is given: about 500 photographs of 100 kB."""


def run(path: str, overrides: tuple[str, ...]) -> None:
    """Print a line per check.

    Raises:
        PipelineError: something will fail.
    """
    found = [*check_versions(), *check_gpus(), *check_decoders(), check_cores(), check_dvc(Path())]
    try:
        config = load_config(path, overrides)
    except PipelineError as error:
        found.append(Finding(Level.FAIL, "configuration", " ".join(str(error).split())))
    else:
        found += check_experiment(config)
    print(
        tabulate(
            [(each.level.value, each.name, each.text) for each in found],
            tablefmt="plain",
            maxcolwidths=[None, None, 96],
        )
    )
    failing = [each.name for each in found if each.level is Level.FAIL]
    if failing:
        raise PipelineError(
            f"{len(failing)} of these will fail: {', '.join(failing)}", do="see the lines marked `fail`"
        )
    warned = sum(each.level is Level.WARN for each in found)
    print("no problem found that will make the experiment fail" + f"; {count_of(warned, 'warning')}" * bool(warned))


def check_experiment(config: Config) -> Iterator[Finding]:
    """Checks of the machine against what the configuration needs."""
    gpu = torch.cuda.is_available()
    yield check_precision(config, torch.device("cuda", 0) if gpu else torch.device("cpu"))
    yield check_weights(config)
    yield check_space(config)
    yield check_disk(local_work(config.work))
    yield check_shared_memory(config, gpu, Path("/dev/shm"))
    yield check_open_files(config, gpu)


def check_precision(config: Config, device: torch.device) -> Finding:
    """Compare the precisions with the fastest one of the device."""
    best, where = fastest_precision(device), "this GPU" if device.type == "cuda" else "a CPU"
    sections = ("teacher", "teacher_logits", "student")
    found = {f"{name}.precision": getattr(config, name).precision for name in sections}
    slow = [f"{key} {value}" for key, value in found.items() if value not in (best, "float32")]
    if slow and best != "bfloat16":
        return Finding(Level.WARN, "precision", f"{', '.join(slow)}: may be slower than {best} on {where}")
    return Finding(Level.OK, "precision", f"{', '.join(sorted(set(found.values())))}; {best} suits {where}")


def check_weights(config: Config) -> Finding:
    """Look for the pretrained weights of models that are not trained yet."""
    students = [name for name in config.students if not read_json(student_folder(config, name) / "metrics.json")]
    tags = {config.student_named(name).timm_tag for name in students}
    if config.runs_teacher("train-student") and not read_json(teacher_folder(config) / "metrics.json"):
        tags |= {member.timm_tag for member in config.teacher.members}
    missing = {tag: missing_weights(tag) for tag in sorted(tag for tag in tags if tag)}
    text = "; ".join(f"{tag}: {reason}" for tag, reason in missing.items() if reason)
    found = f"{', '.join(missing)}: in the local cache, or on the hub" if missing else "none to download"
    return Finding(Level.FAIL if text else Level.OK, "weights", text or found)


def _most_workers(config: Config, gpu: bool) -> int:
    sections = (config.teacher, config.student, config.teacher_logits, config.evaluate)
    return max(resolve_workers(section.workers, gpu) for section in sections)


def check_disk(work: Path) -> Finding:
    """Measure the disk of the work folder."""
    folder = existing_parent(work)
    try:
        speed = measure_disk(folder)
    except OSError as error:
        return Finding(Level.FAIL, "disk", f"{folder}: cannot be written: {error.strerror}")
    text = f"{folder.resolve()}: writes {size_of(speed.write)}/s, reads {size_of(speed.read)}/s"
    if speed.read < SLOW_DISK:
        return Finding(Level.WARN, "disk", f"{text}: slow, training may wait for images; set `work` to a faster disk")
    return Finding(Level.OK, "disk", text)


def check_space(config: Config) -> Finding:
    """Compare the free space with shards and stores; checkpoints and results are small beside them."""
    folder = existing_parent(local_work(config.work))
    free = free_bytes(folder)
    try:
        needed = needed_bytes(config)
    except PipelineError as error:
        text = f"{size_of(free)} free; the size of the data is not known yet: {error.what}"
        return Finding(Level.WARN, "free space", text)
    text = f"{folder.resolve()}: {size_of(free)} free, shards and stores take {size_of(needed)}"
    level = Level.FAIL if free < needed else Level.WARN if free < 2 * needed else Level.OK
    return Finding(level, "free space", text)


def needed_bytes(config: Config) -> int:
    """Bytes of shards and stores that are not there yet, at most.

    Raises:
        PipelineError: there is neither an index nor a folder of images to count.
    """
    shards, index = 0, index_path(config, "train")
    if index.exists():
        data = Index(index)
        samples, classes = data.samples.tolist(), len(data.classes)
        if is_remote(data.location):
            shards = min(int(config.data.cache_gb * GB), sum(shard["bytes"] for shard in data.shards))
    elif config.data.source == "shards":
        raise PipelineError("the shards are not indexed; run: pipeline prepare")
    else:
        splits = [*list_splits(config.data).values()]
        shards = sum(split.bytes for split in splits)
        samples, classes = equal_shards(len(splits[0].names), config.data.shard_samples), len(splits[0].classes)
    wanted = [store_spec(config, purpose) for purpose in PURPOSES if config.needs_store(purpose)]
    return shards + sum(estimate(spec, samples, classes).bytes for spec in wanted if "://" not in config.work)


def check_shared_memory(config: Config, gpu: bool, folder: Path) -> Finding:
    """Compare /dev/shm with the buffers that loader workers render into, and with evaluation batches."""
    name, pixels = "shared memory", 3 * config.recipe.size**2
    workers = max(resolve_workers(section.workers, gpu) for section in (config.teacher, config.student))
    needed = (2 * workers + 2) * config.student.batch_size * pixels if workers else 0
    evaluating = resolve_workers(config.evaluate.workers, gpu)
    needed = max(needed, 2 * evaluating * config.evaluate.batch_size * pixels)
    if not needed:
        return Finding(Level.OK, name, "not needed: no loader workers")
    free = free_bytes(folder) if folder.exists() else 0
    text = f"{free / 2**20:,.0f} MiB free in {folder}, loader workers take up to {needed / 2**20:,.0f} MiB"
    if free < needed:
        text += "; enlarge it (docker run --shm-size=16g), or set fewer workers"
        return Finding(Level.FAIL, name, text)
    return Finding(Level.OK, name, text)


def check_open_files(config: Config, gpu: bool) -> Finding:
    """Compare the limit of open files with what loader workers need."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = _most_workers(config, gpu)
    needed = needed_open_files(workers)
    if hard == resource.RLIM_INFINITY or hard >= needed:
        limit = "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard:,} allowed"
        return Finding(Level.OK, "open files", f"{limit}, {workers} workers need {needed:,}")
    text = f"up to {hard:,} allowed, {workers} workers need {needed:,}: raise ulimit -n, or set fewer workers"
    return Finding(Level.FAIL, "open files", text)
