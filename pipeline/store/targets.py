"""Where a store is published to: a folder or a single file, at a path or URL."""

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import fsspec

from pipeline.common.errors import PipelineError, is_io_error, unwritable
from pipeline.common.files import atomic_write, is_local
from pipeline.store import publication as form


class Target(Protocol):
    """Where a publication is written to."""

    def has(self, name: str, size: int) -> bool:
        """Whether there is a complete file with this name and size."""
        ...

    def write(self, name: str, data: bytes) -> None: ...


class FolderTarget:
    """A folder at a path or URL. Files are complete or absent: renamed locally, single PUTs at object stores."""

    def __init__(self, where: str):
        self._filesystem, root = fsspec.core.url_to_fs(where)
        self._root = root.rstrip("/")

    def has(self, name: str, size: int) -> bool:
        try:
            return self._filesystem.info(f"{self._root}/{name}")["size"] == size
        except FileNotFoundError:
            return False

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._root}/{name}"
        if is_local(self._filesystem):
            with atomic_write(Path(path)) as temporary:
                temporary.write_bytes(data)
        else:
            self._filesystem.pipe_file(path, data)


class ArchiveTarget:
    """A tar file with deterministic bytes."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar

    def has(self, name: str, size: int) -> bool:
        return False

    def write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


@contextlib.contextmanager
def open_target(where: str) -> Iterator[Target]:
    """A folder, or a `.tar` that appears when the block has succeeded.

    Raises:
        PipelineError: the disk is full, or the server refuses.
    """
    try:
        if not form.is_archive(where):
            yield FolderTarget(where)
            return
        filesystem, path = fsspec.core.url_to_fs(where)
        if is_local(filesystem):
            with atomic_write(Path(path)) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                yield ArchiveTarget(tar)
            return
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(f"{folder}/store.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                yield ArchiveTarget(tar)
            filesystem.put_file(f"{folder}/store.tar", path)
    except PipelineError:
        raise
    except Exception as error:
        if not is_io_error(error) and "://" not in where:
            raise
        raise unwritable(where, error) from error
