"""Sources that hold many images in one file, and are read in one pass: Parquet files, data sets of torchvision.

Shards are written in a random order. So the images are copied to one plain file first, which is deleted when the shards
are written.
"""

import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import PipelineError, unwritable
from pipeline.common.files import StatSignature
from pipeline.common.progress import progress
from pipeline.shards.contents import cached_digests, digest


@dataclass(frozen=True)
class Container(ABC):
    """Images with their names."""

    root: Path
    """A folder that holds the files."""
    total_bytes: int
    """Size of all files."""
    count: int
    """Number of images."""

    @abstractmethod
    def images(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the encoded image of each, always in the same order.

        Raises:
            PipelineError: a file cannot be read, or an image is missing.
        """

    def selected(self, names: set[str], title: str) -> Iterator[tuple[str, bytes]]:
        """Yield the images with these names, and show progress.

        Raises:
            PipelineError: one of them no longer exists.
        """
        remaining = set(names)
        with progress(self.count, f"{title} {self.root}", "image") as bar:
            for name, image in self.images():
                if name in remaining:
                    remaining.remove(name)
                    yield name, image
                bar.update()
        if remaining:
            raise PipelineError(
                f"{self.root}: image {min(remaining)}",
                expected="the images that there were when prepare started",
                found="files that have changed since",
                do="run: pipeline prepare",
            )


def container_digests(
    container: Container, names: list[str], signatures: list[StatSignature], cache: Path, trust: bool
) -> list[str]:
    """The digests of images of a container, see `cached_digests`."""

    def read(missing: list[str]) -> dict[str, str]:
        return {name: digest(image) for name, image in container.selected(set(missing), "read")}

    return cached_digests(names, signatures, cache, trust, read)


@dataclass(frozen=True)
class Extent:
    """Where an image is stored in a plain file."""

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.path}: {self.size:,} bytes at {self.offset:,}"


@contextlib.contextmanager
def unpacked(container: Container, names: set[str], folder: Path) -> Iterator[dict[str, Extent]]:
    """Copy images to a temporary file in `folder`, which exists inside the block; yield where each is.

    Raises:
        PipelineError: the disk is full or read-only.
    """
    path = folder / f".images.{secrets.token_hex(4)}.partial"
    try:
        yield _copy(container, names, path)
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _copy(container: Container, names: set[str], path: Path) -> dict[str, Extent]:
    extents, offset = {}, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for name, image in container.selected(names, "unpack"):
                file.write(image)
                extents[name] = Extent(path, offset, len(image))
                offset += len(image)
    except OSError as error:
        raise unwritable(f"{path}:", error) from error
    return extents
