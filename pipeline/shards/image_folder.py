"""Class folders that are evaluated as they are, without shards."""

from pathlib import Path

import google_crc32c
import numpy as np

from pipeline.common.errors import PipelineError, unreadable
from pipeline.config.schema import Data
from pipeline.shards.conversion import stored_form
from pipeline.shards.folders import list_class_folders
from pipeline.shards.images import Undecodable, decode
from pipeline.shards.index import Index


class ImageFolder:
    """Images in one folder per class, decoded as `prepare` and an `Index` would; a row is a position in the listing.

    Cheap to pickle: it holds names only.
    """

    def __init__(self, root: Path, what: str, data: Data, classes: list[str]):
        """
        Args:
            what: the configuration key, for messages.
            data: its `max_pixels` and `exif_orientation` are used.
            classes: names of the classes that models predict; folders may have other names, see `folders`.

        Raises:
            UsageError, PipelineError: no such folder, no class, or a class without images.
        """
        listing = list_class_folders(root, what)
        self.classes = classes
        self.root, self.folders, self.names = listing.root, listing.classes, listing.names
        self.max_pixels, self.exif_orientation = data.max_pixels, data.exif_orientation
        self.folder_numbers = np.array(listing.labels, np.int64)
        """Position in `folders` of each image, int64 (images,)."""
        self.signatures = listing.signatures
        """Signature of each image's file."""

    def __len__(self) -> int:
        return len(self.names)

    def locate(self, row: int) -> tuple[int, int]:
        """Shard and position of an image, as for an index."""
        return 0, row

    def also_in(self, index: Index) -> list[str]:
        """Names of those images that are samples of an index too, byte for byte as shards store them; reads every file."""
        samples = set[tuple[int, int]]()
        for shard in range(len(index.names)):
            rows = index.rows(shard)
            samples.update(zip(rows["size"].tolist(), rows["crc32c"].tolist(), strict=True))
        found = []
        for position, name in enumerate(self.names):
            form = stored_form(self._read(position), self.max_pixels, self.exif_orientation)
            if form and (len(form[1]), google_crc32c.value(form[1])) in samples:
                found.append(name)
        return found

    def _read(self, position: int) -> bytes:
        path = self.root / self.names[position]
        try:
            return path.read_bytes()
        except OSError as error:
            raise unreadable(str(path), error) from error

    def image(self, shard: int, position: int) -> np.ndarray:
        """Read and decode an image, uint8 (height, width, 3).

        Raises:
            PipelineError: the file cannot be read, or is not an image. No image is ever left out.
        """
        path, data = self.root / self.names[position], self._read(position)
        try:
            form = stored_form(data, self.max_pixels, self.exif_orientation)
            return decode(data if form is None else form[1], self.max_pixels)
        except Undecodable as error:
            raise PipelineError(
                f"{path}: not a readable image", found=str(error), do="restore the file, or remove it",
                expected=f"an image that can be decoded, of at most {self.max_pixels:,} pixels (data.max_pixels)",
            ) from error  # fmt: skip
