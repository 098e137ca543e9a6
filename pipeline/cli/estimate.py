"""`pipeline estimate`: what an experiment costs on this machine, and whether a store pays, before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

from pipeline.cli import durations
from pipeline.cli.dry_run import check_one_teacher
from pipeline.cli.durations import Hardware, Rates
from pipeline.common.cores import available_cores, limit_threads, resolve_workers
from pipeline.common.errors import NotReady, UsageError
from pipeline.common.wording import count_of, duration, size_of
from pipeline.config.paths import index_path
from pipeline.config.schema import Config
from pipeline.config.store_spec import StoreSpec, store_spec
from pipeline.shards.cache import GB
from pipeline.shards.index import Index
from pipeline.store.estimate import equal_shards, estimate
from pipeline.store.kinds import KINDS

FRACTIONS = (0.1, 0.25, 0.5, 1.0)
"""Views per epoch in the table by views."""
SAMPLED = 24
"""Images that are decoded and rendered."""
HEIGHT, WIDTH = 375, 500
"""Pixels of generated pictures."""


@dataclass(frozen=True)
class Images:
    """The training images, as far as an estimate depends on them."""

    samples: list[int]
    """Number of samples in each shard."""
    classes: int
    val: int
    """Number of validation images."""
    bytes: int | None
    """Size of the shards; None if unknown."""
    files: list[BytesIO]
    """Some of them, encoded."""
    source: str
    names: list[str] | None = None
    """Of the classes; None if unknown."""

    @property
    def count(self) -> int:
        return sum(self.samples)


@dataclass(frozen=True)
class StudentTimes:
    """Seconds for one student, with the teacher in the loop and with the store."""

    online: float
    offline: float

    @property
    def saved(self) -> float:
        return self.online - self.offline

    def pays_after(self, seconds: float) -> float | None:
        """After how many students a store that takes this long has paid for itself; None: never.

        A step may take as long with the teacher as without, where rendering is slower than both.
        """
        return seconds / self.saved if self.saved > 0.01 * self.online else None


def run(config: Config, device: torch.device, images: int | None, classes: int) -> None:
    """Measure and print.

    Args:
        images: number of training images; None: those of the index.

    Raises:
        UsageError: neither an index nor `images`.
    """
    limit_threads(resolve_workers(config.student.workers, device.type == "cuda"))
    found = indexed_images(config) if images is None else assumed_images(config, images, classes)
    trained = config.needs_teacher("train-student") and not _used_as_it_is(config, found)
    rates = durations.measure(config, found.files, found.classes, device, trained)
    print(describe(config, found, rates, Hardware(available_cores(), device.type == "cuda"), device))


def indexed_images(config: Config) -> Images:
    """The images that `pipeline prepare` indexed.

    Raises:
        UsageError: there is no index.
    """
    try:
        train, val = (Index(index_path(config, split)) for split in ("train", "val"))
    except NotReady as error:
        raise UsageError(
            error.what, expected="an index, or the number of images", found="neither",
            do="run pipeline prepare, or: pipeline estimate --images N",
        ) from error  # fmt: skip
    rows = np.linspace(0, len(train) - 1, min(SAMPLED, len(train)), dtype=int)
    files = [BytesIO(train.read(*train.locate(int(row)))) for row in rows]
    size = sum(shard["bytes"] for index in (train, val) for shard in index.shards)
    return Images(train.samples.tolist(), len(train.classes), len(val), size, files, f"{len(files)} of the images", train.classes)


def assumed_images(config: Config, images: int, classes: int) -> Images:
    """Images of which only the numbers are known, in shards as `pipeline prepare` divides them."""
    samples = equal_shards(images, config.data.shard_samples)
    pictures = f"generated pictures of {WIDTH} x {HEIGHT} pixels"
    return Images(samples, classes, 0, None, [generate_picture(seed) for seed in range(4)] * (SAMPLED // 4), pictures)


def generate_picture(seed: int) -> BytesIO:
    """A JPEG with smooth areas and noise, which takes about as long to decode as a photograph."""
    chance, buffer = np.random.default_rng(seed), BytesIO()
    smooth = Image.fromarray(chance.integers(0, 256, (12, 16, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.int16) + chance.integers(-12, 13, (HEIGHT, WIDTH, 1))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=90)
    return buffer


def _used_as_it_is(config: Config, images: Images) -> bool:
    """Whether the teacher's weights have the classes of the images, so that it is not trained."""
    first = config.teacher.members[0]
    names = images.names
    if names is None and first.class_map is None:
        names = [str(number) for number in range(images.classes)]
    return bool(first.weights) and check_one_teacher(first, names, config.teacher_size("train-student"))


def _shard_bytes(config: Config, images: Images) -> int | None:
    """Bytes of shards below `work`: written, or copies of remote ones; None if unknown."""
    if config.data.source != "shards" or images.bytes is None:
        return images.bytes
    return min(int(config.data.cache_gb * GB), images.bytes) if "://" in config.data.train else 0


def describe(config: Config, images: Images, rates: Rates, machine: Hardware, device: torch.device) -> str:
    """The estimate as text."""
    seconds = durations.stage_seconds(config, rates, images.count, images.val, machine)
    sizes = durations.bytes_written(config, rates, images.count, images.classes, _shard_bytes(config, images) or 0)
    known = {name: size for name, size in sizes.items() if size}
    text = [
        f"{config.name}: {images.count:,} images, {count_of(images.classes, 'class')}",
        f"decoding and rendering measured with {images.source}; one process, without torch.compile",
        durations.describe(seconds, known, device),
    ]
    left_out = ["the shards"] if _shard_bytes(config, images) is None else []
    if config.finetune.students:
        left_out.append("fine-tuning")
    if config.needs_store("train-student") and config.fetch_source("train-student"):
        left_out.append("fetching the published store")
    if left_out:
        text.append(f"  not included: {', '.join(left_out)}")
    names = [name for name in config.students if config.student_named(name).distillation != "none"]
    if not names:
        return "\n".join([*text, "no student is distilled, so no store is needed"])
    spec, section = store_spec(config, "train-student"), config.student_named(names[0])
    step, teacher = rates.step[names[0]], rates.forward["teacher"]
    online, offline = (machine.training(config, section, rates, each, images.count) for each in (step + teacher, step))
    return "\n".join(
        [
            *text,
            "",
            f"student {names[0]}, {section.epochs} epochs: {duration(offline)} with the store, {duration(online)} with the"
            " teacher in the loop",
            table_by_views(config, images, rates, machine, spec, StudentTimes(online, offline), section.epochs),
            "with fewer views than epochs, views are used again",
            "",
            f"the store by kind, {spec.views} views per image:",
            table_by_kind(config, images.samples, images.classes),
        ]
    )


def table_by_views(
    config: Config, images: Images, rates: Rates, machine: Hardware, spec: StoreSpec, student: StudentTimes, epochs: int
) -> str:
    """Bytes and time of the store for several numbers of views, and after how many students it pays."""
    rows, block = [], spec.recipe.block
    for views in sorted({max(round(epochs * fraction / block), 1) * block for fraction in FRACTIONS} | {spec.views}):
        size = estimate(replace(spec, views=views), images.samples, images.classes)
        seconds = machine.labelling(config, rates, images.count, views)
        # without what every stage takes to start, which would decide for a few images
        after, ten = student.pays_after(seconds - durations.START), seconds + 10 * student.offline
        paid = "never" if after is None else f"{after:.2f} students"
        mark = " *" if views == spec.views else ""
        rows.append([f"{views}{mark}", size_of(size.bytes), duration(seconds), paid, duration(ten), duration(10 * student.online)])
    headers = ["views", spec.kind, "teacher's time", "pays off after", "10 students and store", "10 students online"]
    return tabulate(rows, headers, disable_numparse=True) + "\n* as configured"


def table_by_kind(config: Config, samples: Sequence[int], classes: int) -> str:
    """Bytes and files of every kind of store."""
    rows = []
    for kind, about in KINDS.items():
        settings = config.teacher_logits.model_copy(update={"kind": kind})
        spec = store_spec(config.model_copy(update={"teacher_logits": settings}), "train-student")
        size = estimate(spec, samples, classes)
        mark = " *" if kind == config.teacher_logits.kind else ""
        rows.append([kind + mark, f"{size.row_bytes:,}", size_of(size.bytes), f"{size.files:,}", about.distillation])
    return tabulate(rows, ["kind", "bytes per view", "size", "files", "distillation"], disable_numparse=True)
