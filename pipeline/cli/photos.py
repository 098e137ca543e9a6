"""What a folder of images holds: its splits and classes, by listing; sizes, from the headers of a sample."""

import io
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.cli.find_data import MANY, VAL_FRACTION_OF_MANY, find_data
from pipeline.common.errors import PipelineError
from pipeline.common.wording import count_of, three_digits
from pipeline.config.schema import Data
from pipeline.shards.conversion import FOLDER_FORMATS
from pipeline.shards.listing import Listing, count_by_extension
from pipeline.shards.sources import UNLABELLED_FOLDER, list_splits

SAMPLE = 200
"""Files whose headers are read."""

ImageFile = Path | io.BytesIO


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

    def sample(self, count: int) -> list[ImageFile]:
        """Training images, spread evenly over the list."""
        return sample_images(self.train, count)


def look(root: Path) -> Photos:
    """List a folder's splits and read the headers of a sample.

    Raises:
        UsageError: see `find_data`.
        PipelineError: no classes or no images, classes that differ between the splits, or no readable header.
    """
    data = find_data(root)
    train, val = list_splits(data).values()
    if data.val_fraction and len(train.names) + len(val.names) >= MANY:
        data = data.model_copy(update={"val_fraction": VAL_FRACTION_OF_MANY})
        train, val = list_splits(data).values()
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise PipelineError(
            f"{root}: classes",
            expected=f"the same class folders in {data.train} and {data.val}",
            found=f"only in one of them: {', '.join(odd[:5])}",
            do="add or remove these folders",
        )
    return Photos(data, train, val, header_sizes(root, sample_images(train, SAMPLE)))


def sample_images(listing: Listing, count: int) -> list[ImageFile]:
    """Images of a listing, spread evenly over the list; of a container, the first ones."""
    if listing.container:
        return [io.BytesIO(image) for _, image in islice(listing.container.images(), count)]
    chosen = np.linspace(0, len(listing.names) - 1, min(count, len(listing.names))).astype(int)
    return [listing.root / listing.names[number] for number in chosen]


def header_sizes(root: Path, files: list[ImageFile]) -> np.ndarray:
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
            f"{root}: no image could be read",
            expected=f"images of the formats {', '.join(FOLDER_FORMATS)}",
            found=f"none among {len(files)} files",
            do="check the files",
        )
    return np.array(sizes)


def experiment_name(root: Path) -> str:
    """A folder's name as that of an experiment."""
    name = root.resolve().stem if root.is_file() else root.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[:100] or "photos"


def describe(photos: Photos) -> str:
    """What was found, as text."""
    train, val = photos.train, photos.val
    counts = Counter(train.labels)
    fewest, most = min(counts.values()), max(counts.values())
    lines = [
        f"{len(train.names):,} training images in {photos.data.train}, {len(val.names):,} for validation"
        + (f" in {photos.data.val}" if photos.data.val else "")
        + (f": {photos.data.val_fraction:.0%} of each class" if photos.data.val_fraction else ""),
        f"{len(train.classes):,} classes with {fewest:,} training images each"
        if fewest == most
        else f"{len(train.classes):,} classes with {fewest:,} to {most:,} training images each",
        f"{photos.megapixels:.2g} megapixels on average, {photos.short_side} px the median of the shorter side"
        f" (headers of {len(photos.sizes)} files)",
    ]
    lines += [f"ignored: {count_by_extension(each.ignored)}" for each in (train, val) if each.ignored]
    lines += [f"ignored: {text}" for each in (train, val) for text in each.left_out]
    return "\n".join(lines)


def warnings(photos: Photos) -> list[str]:
    """What limits results or speed."""
    counts = Counter(photos.train.labels)
    found = []
    if len(photos.val.names) < 400:
        share = three_digits(100 / len(photos.val.names))
        found.append(f"one validation image is {share} points of accuracy: small differences mean nothing")
    if min(counts.values()) < 20:
        name = photos.train.classes[min(counts, key=lambda label: counts[label])]
        found.append(f"class {name} has {count_of(min(counts.values()), 'training image')}: expect little of classes below 20")
    if max(counts.values()) > 10 * min(counts.values()):
        found.append("the largest class has over ten times the images of the smallest: accuracy favours it")
    if UNLABELLED_FOLDER in photos.train.classes:
        found.append(f"the folder {UNLABELLED_FOLDER} counts as a class; see data.unlabelled")
    if photos.megapixels > 2:
        found.append(
            "large photographs are decoded again for every three views: copies of about 500 px are faster to train on"
        )
    return found
