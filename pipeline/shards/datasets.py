"""Data sets of torchvision by name, from files on this machine: CIFAR10, Flowers102, Food101, OxfordIIITPet, ..."""

import inspect
import io
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.common.errors import PipelineError, UsageError, reason
from pipeline.common.files import StatSignature, stat_signature
from pipeline.config.schema import Data
from pipeline.shards.containers import Container
from pipeline.shards.listing import Listing

SPLIT_NAMES = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}
"""Values of torchvision's argument `split`; the first that a data set has is used."""
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def list_dataset(data: Data) -> dict[str, Listing]:
    """List train and val, or train alone if data.val_fraction divides it.

    A data set of image files is listed as those files; of any other, the images are stored as PNG.

    Raises:
        UsageError: no such data set, not one of images with one label each, or it has no split for validation.
        PipelineError: it is not there or damaged, or the splits' classes differ.
    """
    datasets = {split: _open(data, split) for split in _splits(data)}
    pairs = {split: _labelled(data, dataset) for split, dataset in datasets.items()}
    train, count = datasets["train"], 1 + max((label for _, label in pairs["train"]), default=-1)
    classes = _class_names(train) or [str(number) for number in range(count)]
    for split, dataset in datasets.items():
        names = _class_names(dataset)
        largest = max((label for _, label in pairs[split]), default=-1)
        if names not in ([], classes) or not 0 <= largest < len(classes) or min(label for _, label in pairs[split]) < 0:
            raise PipelineError(
                f"{data.dataset}: classes of {split}",
                expected=f"images of the {len(classes)} classes of training",
                found=f"{len(names)} classes, largest label {largest}",
                do=f"check the files in {data.train}",
            )
    return {split: _listing(data, datasets[split], pairs[split], classes) for split in datasets}


def download(data: Data) -> None:
    """Download what is missing of the data set.

    Raises:
        UsageError, PipelineError: see `list_dataset`; no network.
    """
    for split in _splits(data):
        _open(data, split, download=True)


def _splits(data: Data) -> tuple[str, ...]:
    return ("train",) if data.val_fraction else ("train", "val")


def _kind(name: str) -> tuple[Any, Any]:
    """The class of a data set and its parameters."""
    from torchvision import datasets  # takes a second to import

    kind = getattr(datasets, name, None)
    if isinstance(kind, type) and issubclass(kind, datasets.VisionDataset):
        parameters = inspect.signature(kind).parameters
        needed = {key for key, at in parameters.items() if at.default is at.empty and at.kind is not at.VAR_KEYWORD}
        if needed == {"root"}:
            return kind, parameters
    raise UsageError(
        f"data.dataset: {name!r}",
        expected="a data set of torchvision that needs no argument but its folder, for example CIFAR10 or Flowers102",
        found="one that needs other arguments" if kind else "no such data set",
        do="correct the name, or prepare class folders or a table",
    )


def _open(data: Data, split: str, download: bool = False) -> Any:
    """The torchvision data set of a split; downloads it only if it is not there."""
    kind, parameters = _kind(data.dataset)
    if not data.train:
        raise UsageError("data.train", expected="the data set's folder", found="an empty key", do="set data.train")
    if "train" in parameters:
        choices: list[dict[str, Any]] = [{"train": split == "train"}]
    elif "split" in parameters:
        choices = [{"split": name} for name in SPLIT_NAMES[split]]
    else:
        choices = [{}] if data.val_fraction else []
    # of a data set of files, an item is then a path instead of an image
    paths = {"loader": _as_it_is} if "loader" in parameters or _is_image_folder(kind) else {}
    for choice in choices:
        arguments = {"root": str(Path(data.train).expanduser()), **choice, **paths}
        try:
            return kind(**arguments)
        except Exception as error:  # RuntimeError, OSError, ImportError, errors of pickle, scipy, ...
            if isinstance(error, ValueError) and "argument split" in str(error):
                continue
            if not (download and "download" in parameters):
                raise _not_there(data, error) from error
        try:
            return kind(**arguments, download=True)
        except Exception as error:
            raise _not_there(data, error) from error
    raise UsageError(
        f"data.dataset: {data.dataset}",
        expected=f"a split for {'training' if split == 'train' else 'validation'}",
        found="none",
        do="set data.val_fraction",
    )


def _as_it_is(path: Any) -> Any:
    return path


def _is_image_folder(kind: type) -> bool:
    from torchvision.datasets import ImageFolder

    return issubclass(kind, ImageFolder)


def _not_there(data: Data, error: Exception) -> PipelineError:
    wanted = "run: pipeline prepare, which downloads it" if data.download else "set data.download: true to download it"
    return PipelineError(
        f"{data.dataset} in {data.train}",
        expected="the files of torchvision's data set",
        found=str(error) or type(error).__name__,
        do=f"correct data.train, or {wanted}",
    )


def _labelled(data: Data, dataset: Any) -> list[tuple[Path | None, int]]:
    """The file of each image, None if it has none of its own, and its label.

    Raises:
        UsageError: items are not an image and one class number.
    """
    try:
        if files := _files(dataset):
            return [(Path(path), operator.index(label)) for path, label in files]
        labels = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
        if labels is None:
            labels = [dataset[position][1] for position in range(len(dataset))]
        if len(labels) != len(dataset) or not len(dataset):
            raise ValueError(f"{len(labels)} labels for {len(dataset)} images")
        return [(None, operator.index(label)) for label in labels]
    except (TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"data.dataset: {data.dataset}",
            expected="images with one class number each",
            found=reason(error),
            do="name another data set, or prepare class folders or a table",
        ) from error


def _files(dataset: Any) -> list[tuple[Any, Any]]:
    """Path and label of each image; empty if images are not files of their own."""
    if getattr(dataset, "loader", None) is _as_it_is:
        return [dataset[position] for position in range(len(dataset))]
    if hasattr(dataset, "_images") and hasattr(dataset, "_labels"):  # OxfordIIITPet
        pairs = list(zip(dataset._images, dataset._labels, strict=True))
    else:
        pairs = list(getattr(dataset, "_samples", []))  # GTSRB
    return pairs if pairs and all(isinstance(path, str | Path) for path, _ in pairs) else []


def _class_names(dataset: Any) -> list[str]:
    """The names of the classes by number; empty if it has none."""
    names = getattr(dataset, "classes", None) or []
    texts = [", ".join(name) if isinstance(name, tuple | list) else str(name) for name in names]
    return texts if len(set(texts)) == len(texts) else []


def _listing(data: Data, dataset: Any, pairs: list[tuple[Path | None, int]], classes: list[str]) -> Listing:
    root = Path(os.path.abspath(Path(data.train).expanduser()))
    files = sorted((os.path.relpath(path, root).split(os.sep), label) for path, label in pairs if path)
    if files:
        names = ["/".join(parts) for parts, _ in files]
        try:
            signatures = [stat_signature(os.stat(root / name)) for name in names]
        except OSError as error:
            raise _not_there(data, error) from error
        return Listing(classes, names, [label for _, label in files], signatures, [], root)
    labels = [label for _, label in pairs]
    signature = _folder_signature(_folder(dataset, root))
    container = TorchvisionImages(root, signature[0], len(labels), data.dataset, dataset, labels)
    return Listing(
        classes, [_name(n) for n in range(len(labels))], labels, [signature] * len(labels), [], root, container=container
    )


def _name(position: int) -> str:
    return f"{position:06d}"


def _folder(dataset: Any, root: Path) -> Path:
    """The folder of a data set's own files, below the one that may hold several data sets."""
    for name in ("raw_folder", "base_folder", "_base_folder"):
        if folder := getattr(dataset, name, None):
            return root / folder
    return root


def _folder_signature(folder: Path) -> StatSignature:
    """The signature of all files of a folder: total size and latest times."""
    found = [stat_signature(path.stat()) for path in folder.rglob("*") if path.is_file()]
    return sum(at[0] for at in found), max((at[1] for at in found), default=0), max((at[2] for at in found), default=0)


@dataclass(frozen=True)
class TorchvisionImages(Container):
    """The images of a data set that does not keep them in files of their own."""

    dataset_name: str
    dataset: Any
    labels: list[int]

    def images(self) -> Iterator[tuple[str, bytes]]:
        for position, expected in enumerate(self.labels):
            image, label = self.dataset[position]
            if not isinstance(image, Image.Image) or operator.index(label) != expected:
                raise PipelineError(
                    f"{self.dataset_name}: item {position}",
                    expected=f"an image of class {expected}",
                    found=f"{type(image).__name__} of class {label}",
                    do="report this: torchvision lists its labels in a different order from its images",
                )
            yield _name(position), _png(image)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "png")
    return buffer.getvalue()
