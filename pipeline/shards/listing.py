"""What a data source lists: a split's samples, their classes and their keys."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError
from pipeline.common.files import StatSignature
from pipeline.shards.containers import Container

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "dev", "test", "testing")
"""Names that data sets give their splits; the first one found counts."""
NUMBER = "(0|[1-9][0-9]{0,17})"


@dataclass(frozen=True)
class Listing:
    """A split's samples, in an order that depends only on their names."""

    classes: list[str]
    names: list[str]
    """Path below `root`, the name in the container, or the sample's number (digits)."""
    labels: list[int]
    signatures: list[StatSignature]
    """Signature of each image's file; empty for digits."""
    ignored: list[str]
    """Other files, which are not taken for images, and links to folders."""
    root: Path = Path()
    """The folder that `names` are relative to."""
    left_out: tuple[str, ...] = ()
    """What else was found and is not used, for messages."""
    container: Container | None = None
    """What holds the images if they are not files of their own; signatures are then those of the files that hold them."""

    @property
    def bytes(self) -> int:
        """Size of the images; 0 for digits, an estimate for a part of a container."""
        if self.container:
            return self.container.total_bytes * len(self.names) // max(self.container.count, 1)
        return sum(signature[0] for signature in self.signatures)


def sample_keys(names: list[str]) -> list[str]:
    """A key for each name: its path without extension, in [A-Za-z0-9_/-], unique.

    A dot would end a WebDataset key, so other characters become `_`. Names that would then get the same key each get a
    hash of the name appended: a key depends on its own name and the set of names, not on their order.
    """
    keys = [re.sub(r"[^A-Za-z0-9_/-]", "_", name.rpartition(".")[0] or name) for name in names]
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return [
        key if counts[key] == 1 else f"{key}_{hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()}"
        for key, name in zip(keys, names, strict=True)
    ]


def extension(name: str) -> str:
    """A name's extension in lower case, without the dot; empty if there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def count_by_extension(names: list[str]) -> str:
    """Count files per extension, with an example each: `12 .heic (cat/IMG_1.heic), 1 .txt (cat/a.txt)`."""
    examples: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in names:
        label = f".{extension(name)}" if extension(name) else "without an extension"
        counts[label] = counts.get(label, 0) + 1
        examples.setdefault(label, name)
    commonest = sorted(counts, key=lambda label: -counts[label])
    return ", ".join(f"{counts[label]:,} {label} ({examples[label]})" for label in commonest)


def number_classes(where: str, labels: list[str]) -> dict[str, int]:
    """Number the classes, by name and in order.

    If all labels are whole numbers, class n is called n. Otherwise labels are names, which are numbered in the order of
    their Unicode code points, as class folders are.

    Raises:
        PipelineError: no labels, a negative number, or numbers with gaps: a class without images.
    """
    names = set(labels)
    if not names:
        raise PipelineError(f"{where}: classes", expected="at least one image", found="none", do="add images")
    if not all(re.fullmatch(f"-?{NUMBER}", name) for name in names):
        return {name: number for number, name in enumerate(sorted(names))}
    if negative := sorted(name for name in names if name.startswith("-")):
        raise PipelineError(
            f"{where}: classes",
            expected="labels that are names, or numbers from 0",
            found=f"label {negative[0]}",
            do="leave out images without labels",
        )
    last = max(map(int, names))
    if last >= len(names):
        missing = next(str(number) for number in range(last) if str(number) not in names)
        raise PipelineError(
            f"{where}: classes",
            expected=f"labels that are names, or all numbers from 0 to {last} (the largest one found)",
            found=f"{len(names):,} numbers; no training image is of class {missing}",
            do="number the classes from 0 without gaps, or write names, for example class7 instead of 7",
        )
    return {str(number): number for number in range(last + 1)}


def label_numbers(where: str, labels: list[str], numbers: dict[str, int]) -> list[int]:
    """The class number of each label.

    Raises:
        PipelineError: a label belongs to no class.
    """
    if unknown := sorted(set(labels) - numbers.keys()):
        raise PipelineError(
            f"{where}: labels",
            expected=f"those of the {len(numbers)} classes of training",
            found=f"not in training: {unknown[:5]}",
            do="correct these labels, add training images of them, or leave these images out",
        )
    return [numbers[label] for label in labels]


def as_text(label: Any) -> str:
    """A label that is a name or a whole number, as text; empty for anything else."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        return ""
    return str(label).strip()
