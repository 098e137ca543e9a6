"""What a folder of images holds: its splits and classes, by listing; sizes, from the headers of a sample."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.schema import Data
from pipeline.shards.conversion import FOLDER_FORMATS
from pipeline.shards.listing import TRAIN_NAMES, VAL_NAMES, Listing, count_by_extension
from pipeline.shards.sources import list_splits

SAMPLE = 200
"""Files whose headers are read."""
FEW, MANY = 0.2, 0.1
"""The fraction of the images that is used for validation if there is no folder for it, below ENOUGH images and from then
on."""
ENOUGH = 4_000


@dataclass(frozen=True)
class Photos:
    """A folder of images."""

    data: Data
    train: Listing
    val: Listing
    sizes: np.ndarray
    """int (files, 2): width and height of a sample of the training images."""

    @property
    def short_side(self) -> int:
        """Median of the shorter side, in pixels."""
        return int(np.median(self.sizes.min(axis=1)))

    @property
    def megapixels(self) -> float:
        """Mean of the sample."""
        return float(self.sizes.prod(axis=1).mean() / 1e6)

    @property
    def bytes(self) -> int:
        return self.train.bytes + self.val.bytes

    @property
    def majority(self) -> float:
        """Share of the validation images that are of the largest class."""
        return max(Counter(self.val.labels).values()) / len(self.val.labels)

    def sample(self, count: int) -> list[Path]:
        """Training files, spread evenly over the list."""
        return sample_files(self.train, count)


def look(root: Path) -> Photos:
    """List a folder's splits and read the headers of a sample.

    Raises:
        UsageError: no such folder, or no class folders.
        PipelineError: no classes or no images, classes that differ between the splits, or no readable header.
    """
    data = find_splits(root)
    train, val = list_splits(data).values()
    if data.val_fraction and len(train.names) + len(val.names) >= ENOUGH:
        data = data.model_copy(update={"val_fraction": MANY})
        train, val = list_splits(data).values()
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise PipelineError(
            f"{root}: classes",
            expected=f"the same class folders in {data.train} and {data.val}",
            found=f"only in one of them: {', '.join(odd[:5])}",
            do="add or remove these folders",
        )
    return Photos(data, train, val, header_sizes(sample_files(train, SAMPLE)))


def find_splits(root: Path) -> Data:
    """The data section for a folder: its train and validation folders, or a part of its images for validation.

    Raises:
        UsageError: no such folder, or no class folders where they are looked for.
    """
    if not root.is_dir():
        raise UsageError(f"{root}", expected="a folder of images", found="no such folder", do="correct the path")
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir() and _has_folders(path)}
    train, val = (next((folders[name] for name in names if name in folders), None) for names in (TRAIN_NAMES, VAL_NAMES))
    if train and val:
        return Data(train=str(train), val=str(val))
    classes = {path.name.lower() for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if train is None and len(classes) > 1 and not classes & {*TRAIN_NAMES, *VAL_NAMES}:
        train = root
    if train is None:
        raise UsageError(
            f"{root}",
            expected=f"one folder of images per class, either here or in folders for training ({', '.join(TRAIN_NAMES)}) and"
            f" validation ({', '.join(VAL_NAMES)})",
            found=", ".join(str(path.name) for path in sorted(root.iterdir())[:5]) or "an empty folder",
            do="put the images of each class into a folder of its own, or name the folder that holds the class folders",
        )
    return Data(train=str(train), val_fraction=FEW)


def _has_folders(path: Path) -> bool:
    return any(each.is_dir() and not each.name.startswith(".") for each in path.iterdir())


def sample_files(listing: Listing, count: int) -> list[Path]:
    """Files of the training split, spread evenly over the list."""
    chosen = np.linspace(0, len(listing.names) - 1, min(count, len(listing.names))).astype(int)
    return [listing.root / listing.names[number] for number in chosen]


def header_sizes(files: list[Path]) -> np.ndarray:
    """Width and height of images, int (readable files, 2), from their headers.

    Raises:
        PipelineError: none is readable.
    """
    sizes = []
    for file in files:
        try:
            with Image.open(file, formats=FOLDER_FORMATS) as image:
                sizes.append(image.size)
        except Exception:  # Pillow raises OSError, SyntaxError, ValueError, ...; prepare names such files
            continue
    if not sizes:
        raise PipelineError(
            f"{files[0].parent.parent}: no image could be read",
            expected=f"images of the formats {', '.join(FOLDER_FORMATS)}",
            found=f"none among {len(files)} files",
            do="check the files",
        )
    return np.array(sizes)


def experiment_name(root: Path) -> str:
    """A folder's name as that of an experiment."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", root.resolve().name).lstrip(".-")[:100] or "photos"


def describe(photos: Photos) -> str:
    """What was found, as text."""
    train, val = photos.train, photos.val
    counts = Counter(train.labels)
    fewest, most = min(counts.values()), max(counts.values())
    lines = [
        f"{len(train.names):,} training images in {photos.data.train}, {len(val.names):,} for validation"
        + (f" in {photos.data.val}" if photos.data.val else f": {photos.data.val_fraction:.0%} of each class"),
        f"{len(train.classes):,} classes of {fewest:,} to {most:,} training images",
        f"{photos.megapixels:.2g} megapixels on average, {photos.short_side} px the median of the shorter side"
        f" (headers of {len(photos.sizes)} files)",
    ]
    lines += [f"ignored: {count_by_extension(each.ignored)}" for each in (train, val) if each.ignored]
    return "\n".join(lines)


def warnings(photos: Photos) -> list[str]:
    """What limits results or speed."""
    counts = Counter(photos.train.labels)
    found = []
    if len(photos.val.names) < 400:
        share = 100 / len(photos.val.names)
        found.append(f"one validation image is {share:.2g} points of accuracy: small differences mean nothing")
    if min(counts.values()) < 20:
        name = photos.train.classes[min(counts, key=lambda label: counts[label])]
        found.append(f"class {name} has {min(counts.values())} training images: expect little of classes below 20")
    if max(counts.values()) > 10 * min(counts.values()):
        found.append("the largest class has over ten times the images of the smallest: accuracy favours it")
    if photos.megapixels > 2:
        found.append(
            "large photographs are decoded again for every three views: copies of about 500 px are faster to train on"
        )
    return found
