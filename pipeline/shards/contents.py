"""Digests of files' contents, cached: files whose size and times have not changed need not be read again."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError, reason
from pipeline.common.files import StatSignature, is_conclusive, write_if_changed
from pipeline.common.progress import progress

CHUNK = 64  # files per task of a thread


def digest(data: bytes) -> str:
    """BLAKE2b in 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digests(
    root: Path, names: list[str], signatures: list[StatSignature], cache: Path, trust: bool, threads: int
) -> list[str]:
    """The `digest` of each file below `root`, see `cached_digests`.

    Raises:
        PipelineError: a file cannot be read.
    """

    def read(missing: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        with progress(len(missing), f"read {root}", "file") as bar:
            for chunk in _read(root, missing, threads):
                found |= chunk
                bar.update(len(chunk))
        return found

    return cached_digests(names, signatures, cache, trust, read)


def cached_digests(
    names: list[str],
    signatures: list[StatSignature],
    cache: Path,
    trust: bool,
    read: Callable[[list[str]], dict[str, str]],
) -> list[str]:
    """The `digest` of each image.

    Args:
        signatures: of the files that hold them, taken before this call.
        cache: a file that keeps digests by name and signature.
        trust: use the cached digest of an image whose file's signature is unchanged; otherwise everything is read.
        read: returns the digests of the images with these names.
    """
    start = time.time()
    known = (load_cache(cache) or {}) if trust else {}
    entries = list(zip(names, signatures, strict=True))
    found = {name: known[name][1] for name, signature in entries if known.get(name, [0])[0] == [*signature]}
    missing = [name for name in names if name not in found]
    if missing:
        found |= read(missing)
    if missing or len(known) != len(names):
        save_cache(cache, {name: [at, found[name]] for name, at in entries if is_conclusive(at, start)})
    return [found[name] for name in names]


def _read(root: Path, names: list[str], threads: int) -> Iterator[dict[str, str]]:
    chunks = [names[first : first + CHUNK] for first in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(lambda chunk: {name: _file_digest(root / name) for name in chunk}, chunks)
        finally:
            pool.shutdown(cancel_futures=True)


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise unreadable_image(path, error) from error


def unreadable_image(path: Path | str, error: OSError) -> PipelineError:
    return PipelineError(
        f"{path}: the image cannot be read",
        found=reason(error),
        do="restore it or correct its permissions, then run: pipeline prepare",
    )


def load_cache(path: Path) -> Any:
    """The value that `save_cache` wrote; None if the file is missing or damaged."""
    try:
        head, _, body = path.read_text().partition("\n")
        return json.loads(body) if head == digest(body.encode()) else None
    except (OSError, ValueError):
        return None


def save_cache(path: Path, value: Any) -> None:
    """Write a JSON value for `load_cache` if it changed; a full or read-only disk only costs time later."""
    body = json.dumps(value)
    with suppress(PipelineError):
        write_if_changed(path, f"{digest(body.encode())}\n{body}")
