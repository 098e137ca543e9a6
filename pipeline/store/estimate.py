"""What a store costs before it is written, and when writing it pays."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.common.wording import count_of, size_of
from pipeline.config.schema import Config
from pipeline.config.store_spec import StoreSpec
from pipeline.models.build import build_student
from pipeline.models.ensemble import build_ensemble
from pipeline.models.evaluation import multiply_adds
from pipeline.store.kinds import payload_width, row_bytes
from pipeline.store.layout import Dimensions


@dataclass(frozen=True)
class Estimate:
    """Size of a store."""

    rows: int
    shards: int
    blocks: int
    views: int
    """Views per image."""
    arrays: int
    prediction_bytes: int
    check_bytes: int
    row_bytes: int
    """Bytes of predictions per image and view."""
    padding: float
    """Rows without a sample per sample, as every shard takes up as many rows as the largest."""

    @property
    def units(self) -> int:
        return self.shards * self.blocks

    @property
    def files(self) -> int:
        """Files of chunks."""
        return self.units * self.arrays

    @property
    def bytes(self) -> int:
        """Bytes of all chunks; zarr's metadata adds a few kilobytes."""
        return self.prediction_bytes + self.check_bytes

    @property
    def bytes_per_view(self) -> float:
        """Bytes per image and view."""
        return self.bytes / max(self.rows * self.views, 1)


def estimate(spec: StoreSpec, samples: Sequence[int], classes: int) -> Estimate:
    """Estimate a store's size; exact for its chunks.

    Args:
        samples: of each shard.
    """
    dimensions = Dimensions.of(spec.recipe, samples, spec.sampling is not None)
    width = payload_width(spec.kind, classes, spec.k)
    shards, rows = sum(count > 0 for count in samples), int(sum(samples))
    sizes = {name: dimensions.file_bytes(name, width) for name in ("argmax", spec.kind, "check")}
    check = sizes.pop("check")
    return Estimate(
        rows=rows,
        shards=shards,
        blocks=spec.blocks,
        views=spec.views,
        arrays=len(sizes) + 1,
        prediction_bytes=shards * spec.blocks * sum(sizes.values()),
        check_bytes=shards * spec.blocks * check,
        row_bytes=row_bytes(spec.kind, classes, spec.k),
        padding=shards * dimensions.capacity / rows - 1 if rows else 0.0,
    )


def equal_shards(images: int, capacity: int) -> list[int]:
    """Samples per shard as prepare cuts them: shards of nearly equal size, at most `capacity`."""
    shards = -(-images // capacity)
    return [images // shards + (number < images % shards) for number in range(shards)]


def describe_estimate(spec: StoreSpec, size: Estimate, classes: int, rate: float) -> str:
    """Bytes, files and hours as text.

    Args:
        rate: views per second of all processes together.
    """
    hours = size.rows * size.views / rate / 3600
    return (
        f"{size.rows:,} images x {size.views} views as {spec.kind}, {count_of(classes, 'class')},"
        f" {count_of(size.shards, 'shard')}\n"
        f"  bytes  {size_of(size.bytes)}: {size.row_bytes} bytes per view, and"
        f" {size.check_bytes / max(size.rows * size.views, 1):.2f} for checks;\n"
        f"         shards of unequal size add {size.padding:.1%}\n"
        f"  files  {size.files:,}: {size.arrays} arrays x {size.shards:,} shards x {size.blocks} blocks\n"
        f"  time   {hours:,.1f} h at {rate:,.0f} views/s, all processes together"
    )


def describe_break_even(config: Config, spec: StoreSpec, classes: int) -> str:
    """After how many students the store has paid for itself, and how much faster a step is with it.

    In multiply-adds: a student's step costs three of its forward passes and, online, one of the teacher's in addition.
    """
    distilled = [each for each in map(config.student_named, config.students) if each.distillation != "none"]
    student = distilled[0] if distilled else config.student
    epochs = student.epochs
    if spec.purpose == "finetune":
        epochs = config.finetune.epochs
        if config.finetune.students:
            student = config.finetune_student(config.finetune.students[0])
    teacher = multiply_adds(build_ensemble(config.teacher, classes), spec.teacher_size)
    own = multiply_adds(build_student(student, config.recipe, classes, spec.recipe.size), spec.recipe.size)
    return (
        f"  pays   after {spec.views / epochs:.2f} students of {epochs} epochs: the store takes {spec.views} forward passes\n"
        f"         of the teacher per image, each student with the teacher in the loop {epochs}\n"
        f"  then   each step is {1 + teacher / (3 * own):.2f} times as fast as with the teacher in the loop, by"
        f" multiply-adds\n         ({teacher / 1e9:.3g} G the teacher, 3 x {own / 1e9:.3g} G {student.model})"
    )
