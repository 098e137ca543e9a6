"""Additional evaluation sets: ImageNet-ReaL's labels of the validation images, and other images in class folders.

Class numbers are those of ImageNet-1k, in the order of WordNet's names (n01440764 is 0), which the index may number
otherwise: they are translated by name.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.common.errors import PipelineError, UsageError, reason
from pipeline.config.schema import Config
from pipeline.models.class_map import label_set
from pipeline.shards.image_folder import ImageFolder
from pipeline.shards.index import Index

BUNDLED = "timm"
"""The value of `evaluate.real_labels` for timm's copy."""
ILSVRC_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")
LEAST_AGREEMENT = 0.5
"""ImageNet's own labels are among ReaL's for 90 % of the images; in a permuted order hardly any would be."""


@dataclass(frozen=True)
class RealLabels:
    """Several acceptable labels per validation image (Beyer et al. 2020, arXiv 2006.07159)."""

    rows: np.ndarray
    """Rows of the validation images that have any, int64 (N,)."""
    labels: list[frozenset[int]]
    """The labels of each of these."""
    agreement: float
    """Share in 0..1 of these images whose own label is among them."""

    def top1(self, scores: torch.Tensor) -> float:
        """Share in 0..1 of these images whose predicted class is among their labels; scores are (images, classes)."""
        predicted = scores.argmax(1).numpy()[self.rows].tolist()
        return float(np.mean([each in labels for each, labels in zip(predicted, self.labels, strict=True)]))


@dataclass(frozen=True)
class FolderSet:
    """Other images of the same classes."""

    images: ImageFolder
    labels: torch.Tensor
    """Each image's label in the index, int64 (images,)."""


@dataclass(frozen=True)
class FurtherSets:
    """What a configuration names besides the validation set."""

    real: RealLabels | None
    folders: dict[str, FolderSet]

    def warn_of_training_images(self, train: Index) -> None:
        """Print how many images of each set are training images, byte for byte; reads the sets."""
        for name, each in self.folders.items():
            if known := each.images.also_in(train):
                counts = f"{len(known):,} of its {len(each.images):,} images"
                print(f"warning: evaluate.sets.{name}: {counts} are training images too ({known[0]})")

    def describe(self) -> list[str]:
        """A line per set."""
        lines = [f"  {name}: {len(each.images):,} images in {each.images.root}" for name, each in self.folders.items()]
        if self.real:
            share = f"for {self.real.agreement:.1%} of them the validation label is one of these"
            lines.insert(0, f"  real: {len(self.real.rows):,} images have labels; {share}")
        return lines


def open_further_sets(config: Config, val: Index) -> FurtherSets:
    """The sets that `evaluate.real_labels` and `evaluate.sets` name.

    Raises:
        UsageError, PipelineError: a file or folder is missing, or its images or classes are not those of the index.
    """
    settings = config.evaluate
    real = open_real_labels(settings.real_labels, val) if settings.real_labels else None
    return FurtherSets(
        real, {name: open_folder(config, name, Path(folder), val) for name, folder in settings.sets.items()}
    )


def open_folder(config: Config, name: str, folder: Path, val: Index) -> FolderSet:
    """Images in class folders, with the labels that the index gives their classes.

    Raises:
        UsageError, PipelineError: no such folder, or its classes are not those of the index.
    """
    images = ImageFolder(folder, f"evaluate.sets.{name}", config.data, val.classes)
    labels = np.array(folder_labels(str(folder), images.folders, val.classes), np.int64)
    return FolderSet(images, torch.from_numpy(labels[images.folder_numbers]))


def folder_labels(where: str, folders: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The index's label of each class folder, by the folder's name or by ImageNet's number for the class.

    Folders 0 to 999 are numbers, whose order as text (0, 1, 10, 100, ...) means nothing.

    Raises:
        UsageError: the folders are not the classes of the index, or only the index knows what its numbers mean.
    """
    if set(folders) == set(classes):
        return [classes.index(name) for name in folders]
    found = number_labels(classes)
    wordnet = label_set("imagenet-1k")
    names = {name: int(name) for name in folders if name.isdecimal()} or {
        name: wordnet[name] for name in folders if name in wordnet
    }
    if len(names) == len(folders) and found and sorted(names.values()) == sorted(found):
        return [found[names[name]] for name in folders]
    missing, more = (sorted(one) for one in (set(classes) - set(folders), set(folders) - set(classes)))
    parts = [f"{len(folders):,} folders"]
    if missing:
        parts.append(f"none called {_some(missing)}")
    if more:
        parts.append(f"also {_some(more)}")
    raise UsageError(
        f"{where}: class folders",
        expected=f"one per class of the index ({len(classes):,}) with its name. Numbers are understood where the index has"
        " numbers or WordNet's names of ImageNet-1k",
        found="; ".join(parts),
        do="rename the folders to the classes in index.json; every class needs one",
    )


def number_labels(classes: Sequence[str]) -> dict[int, int] | None:
    """The index's label of each class number, where its class names tell: numbers, or WordNet's names of ImageNet-1k."""
    labels = {name: label for label, name in enumerate(classes)}
    numbers = [str(number) for number in range(len(classes))]
    for names in (numbers, label_set("imagenet-1k")):
        if set(names) == set(classes):
            return {number: labels[name] for number, name in enumerate(names)}
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def open_real_labels(path: str, val: Index) -> RealLabels:
    """ReaL's labels of the validation images, each found by the ILSVRC number in its sample's key.

    Args:
        path: real.json, a list with the list of labels of each image in the order of the ILSVRC numbers; or `timm`.

    Raises:
        UsageError: there is no such file, or it has another form.
        PipelineError: a sample's key has no ILSVRC number, or the labels are not of these images and classes.
    """
    lists, classes = read_real_labels(path), len(val.classes)
    found = number_labels(val.classes) or {number: number for number in range(classes)}
    numbers, own = ilsvrc_numbers(val, path, len(lists)), val.labels()
    labels = [frozenset(found.get(each, -1) for each in lists[number - 1]) for number in numbers]
    rows = np.array([row for row, each in enumerate(labels) if each], np.int64)
    known = [labels[row] for row in rows]
    if unknown := [row for row, each in zip(rows, known, strict=True) if -1 in each]:
        raise _other_labels(
            path,
            f"labels from 0 to {classes - 1}",
            f"{lists[numbers[unknown[0]] - 1]} of ILSVRC2012_val_{numbers[unknown[0]]:08d}",
        )
    agreement = (
        float(np.mean([int(own[row]) in each for row, each in zip(rows, known, strict=True)])) if len(rows) else 0.0
    )
    if agreement < LEAST_AGREEMENT:
        raise _other_labels(
            path, f"the validation label of most images among their labels (ImageNet: 90 %), at least {LEAST_AGREEMENT:.0%}",
            f"{agreement:.1%} of {len(rows):,}: images or classes are in another order",
        )  # fmt: skip
    return RealLabels(rows, known, agreement)


def _other_labels(path: str, expected: str, found: str) -> PipelineError:
    return PipelineError(
        f"evaluate.real_labels {path}: not the labels of the validation images and their classes", expected=expected,
        found=found, do="use real.json with ImageNet-1k's validation set and its 1,000 classes, or set it to null",
    )  # fmt: skip


def read_real_labels(path: str) -> list[list[int]]:
    """A list of labels per image, as in real.json.

    Raises:
        UsageError: it cannot be read, or has another form.
    """
    file: Any = resources.files("timm.data") / "_info/imagenet_real_labels.json" if path == BUNDLED else Path(path)
    try:
        found = json.loads(file.read_text())
        valid = isinstance(found, list) and all(
            isinstance(each, list) and all(type(x) is int for x in each) for each in found
        )
        problem = "" if valid else "something else"
    except (OSError, ValueError, RecursionError) as error:
        found, problem = [], reason(error)
    if problem:
        raise UsageError(
            f"evaluate.real_labels {path}", expected="a JSON list with a list of class numbers per image, as in real.json",
            found=problem, do="get real.json from github.com/google-research/reassessed-imagenet, or set it to timm",
        )  # fmt: skip
    return found


def ilsvrc_numbers(val: Index, path: str, count: int) -> list[int]:
    """The number in the key of each validation sample, such as 293 in ILSVRC2012_val_00000293.

    Raises:
        PipelineError: a key has none, has one above `count`, or two samples have the same.
    """
    keys = [key.decode(errors="replace") for shard in range(len(val.names)) for key in val.rows(shard)["key"]]
    numbers, seen = [], set[int]()
    for key in keys:
        match = ILSVRC_NUMBER.search(key)
        number = int(match[1]) if match else 0
        if not 1 <= number <= count or number in seen:
            raise PipelineError(
                f"evaluate.real_labels {path}: validation sample {key!r}",
                expected=f"a key with a number from ILSVRC2012_val_00000001 to {count:08d}, each at most once",
                found="the same number twice" if number in seen else "no such number",
                do="prepare ImageNet's validation set from files with their original names, or set evaluate.real_labels to null",
            )
        seen.add(number)
        numbers.append(number)
    return numbers
