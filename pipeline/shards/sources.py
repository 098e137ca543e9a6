"""Where the images of written shards come from: list the splits of a source, load one sample."""

import dataclasses
from collections import Counter
from pathlib import Path

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.schema import Data
from pipeline.shards.containers import Extent
from pipeline.shards.contents import digest, unreadable_image
from pipeline.shards.conversion import NATIVE, stored_form
from pipeline.shards.datasets import list_dataset
from pipeline.shards.digits import digit_png, list_digits
from pipeline.shards.folders import list_folder
from pipeline.shards.index_file import UNLABELLED
from pipeline.shards.listing import Listing, extension
from pipeline.shards.parquet import list_parquet
from pipeline.shards.tables import list_tables
from pipeline.shards.validation_split import chosen_for_validation

SPLITS = ("train", "val")
UNLABELLED_FOLDER = "unlabelled"


def list_splits(data: Data) -> dict[str, Listing]:
    """List the samples of train and val.

    Raises:
        UsageError: a source is not configured or missing.
        PipelineError: no classes, no images, an empty file, or nothing left for a split.
    """
    if data.source == "digits":
        return {split: list_digits(split) for split in SPLITS}
    if data.source == "table":
        listings = list_tables(data)
    elif data.source == "parquet":
        listings = list_parquet(data)
    elif data.source == "torchvision":
        listings = list_dataset(data)
    else:
        wanted = ("train",) if data.val_fraction else SPLITS
        listings = {split: list_folder(data, split) for split in wanted}
    if data.unlabelled:
        listings["train"] = without_labels(listings["train"])
        if "val" in listings and not listings["train"].classes:
            listings["train"] = dataclasses.replace(listings["train"], classes=listings["val"].classes)
    if data.max_per_class:
        listings = {split: _first(listing, data.max_per_class) for split, listing in listings.items()}
    return divide(listings["train"], data.seed, data.val_fraction) if data.val_fraction else listings


def without_labels(listing: Listing) -> Listing:
    """A listing of class folders, of which the one named `unlabelled` is not a class: its images have no label.

    Raises:
        UsageError: there is no such folder.
    """
    if UNLABELLED_FOLDER not in listing.classes:
        raise UsageError(
            f"data.unlabelled: {listing.root}",
            expected=f"a folder {UNLABELLED_FOLDER} of images without labels, next to those of the classes",
            found="no such folder",
            do="add it, or set data.unlabelled to false",
        )
    classes = [name for name in listing.classes if name != UNLABELLED_FOLDER]
    numbers = {name: number for number, name in enumerate(classes)} | {UNLABELLED_FOLDER: UNLABELLED}
    labels = [numbers[listing.classes[label]] for label in listing.labels]
    return dataclasses.replace(listing, classes=classes, labels=labels)


def divide(listing: Listing, seed: int, fraction: float) -> dict[str, Listing]:
    """Divide a listing into train and val, see `chosen_for_validation`.

    Raises:
        PipelineError: no class has two images.
    """
    names = [name for name, label in zip(listing.names, listing.labels, strict=True) if label != UNLABELLED]
    labels = [label for label in listing.labels if label != UNLABELLED]
    chosen = chosen_for_validation(names, labels, seed, fraction)
    if not chosen:
        raise PipelineError(
            f"{listing.root}: no images for validation",
            expected="a class of at least two images, to divide them by data.val_fraction",
            found=f"{len(listing.names)} images of {len(listing.classes)} classes",
            do="add images, or give those for validation: data.val",
        )
    val = [name in chosen for name in listing.names]
    train = _select(listing, [not each for each in val])
    return {"train": train, "val": dataclasses.replace(_select(listing, val), ignored=[], left_out=())}


def _first(listing: Listing, count: int) -> Listing:
    """The first images of each class."""
    seen: Counter[int] = Counter()
    wanted = []
    for label in listing.labels:
        wanted.append(seen[label] < count)
        seen[label] += 1
    return _select(listing, wanted)


def _select(listing: Listing, wanted: list[bool]) -> Listing:
    def of(values: list) -> list:
        return [value for value, keep in zip(values, wanted, strict=True) if keep]

    names, labels, signatures = of(listing.names), of(listing.labels), of(listing.signatures)
    return dataclasses.replace(listing, names=names, labels=labels, signatures=signatures)


def load_sample(data: Data, root: Path, name: str | Extent, expected: str) -> tuple[str, bytes]:
    """A sample's image type (jpg, png, webp) and encoded bytes, as shards store them.

    Args:
        root: the folder that `name` is below.
        name: path below `root`, where the image of a container was copied to, or the number of a digit.
        expected: digest of its file; empty for digits.

    Raises:
        PipelineError: the file is gone or changed.
    """
    if data.source == "digits":
        return "png", digit_png(int(str(name)))
    path = name if isinstance(name, Extent) else root / name
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise unreadable_image(str(path), error) from error
    if digest(encoded) != expected:
        raise PipelineError(
            f"{path}: the image",
            expected="the bytes that it had when prepare started",
            found="different bytes: it has changed since, or was replaced by a file with the same times",
            do="run: pipeline prepare",
        )
    stored = stored_form(encoded, data.max_pixels, data.exif_orientation)
    return stored or (NATIVE.get(extension(str(name)), "png"), encoded)
