"""Files that are complete or absent, and what file systems say about files."""

import contextlib
import csv
import datetime
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.common.errors import unwritable


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path`, synced to disk, if the block succeeds.

    Raises:
        PipelineError: the disk is full or read-only, or access is denied; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(f"{path}:", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_if_changed(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically; a file that has it already keeps its time."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == text.encode():
            return
    write_text(path, text)


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write a JSON value, indented, atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=sort_keys) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write some columns of rows to a CSV file, atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def remove_partial_files(folder: Path) -> None:
    """Delete the temporary files that killed writers left in a folder and its subfolders."""
    for partial in folder.rglob("*.partial"):
        partial.unlink(missing_ok=True)


StatSignature = tuple[int, int, int]
"""Size, mtime and ctime in ns: a file whose signature is unchanged is taken to be unchanged."""


def stat_signature(status: os.stat_result) -> StatSignature:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_conclusive(signature: StatSignature, taken_at: float) -> bool:
    """Whether any change after `taken_at` (seconds) alters the signature: changes within one clock tick may not."""
    return max(signature[1:]) < (taken_at - 2) * 1e9


def is_local(filesystem: AbstractFileSystem) -> bool:
    """Whether an fsspec file system is the operating system's, network mounts included."""
    return "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))


def modification_time(info: dict[str, Any]) -> float:
    """Seconds since the epoch from an fsspec listing: `mtime` for local files, `LastModified` for S3."""
    when = info.get("mtime") or info.get("LastModified") or 0.0
    return when.timestamp() if isinstance(when, datetime.datetime) else float(when)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
