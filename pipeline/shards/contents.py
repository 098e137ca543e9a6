"""What files hold, as digests; files whose sizes and times are those of the last time need not be read again."""

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.common.errors import PipelineError, reason
from pipeline.common.files import StatSignature, atomic_write, is_conclusive

LOT = 64  # files a thread takes at a time


def digest(data: bytes) -> str:
    """32 hex digits of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digests(
    root: Path, names: list[str], stamps: list[StatSignature], memory: Path, trust: bool, threads: int
) -> list[str]:
    """The `digest` of each file below `root`.

    Args:
        stamps: taken before this call.
        memory: a file that remembers digests by name and stamp.
        trust: take its word for files of an equal stamp; otherwise everything is read.

    Raises:
        PipelineError: a file cannot be read.
    """
    began = time.time()
    known = (recall(memory) or {}) if trust else {}
    found = {name: known[name][1] for name, at in zip(names, stamps, strict=True) if known.get(name, [0])[0] == [*at]}
    missing = [name for name in names if name not in found]
    with tqdm(total=len(missing), desc=f"read {root}", unit="file", leave=False, disable=not missing) as bar:
        for lot in _read(root, missing, threads):
            found |= lot
            bar.update(len(lot))
    if missing or len(known) != len(names):
        kept = zip(names, stamps, strict=True)
        remember(memory, {name: [at, found[name]] for name, at in kept if is_conclusive(at, began)})
    return [found[name] for name in names]


def _read(root: Path, names: list[str], threads: int) -> Iterator[dict[str, str]]:
    lots = [names[first : first + LOT] for first in range(0, len(names), LOT)]
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(lambda lot: {name: _file_digest(root / name) for name in lot}, lots)
        finally:
            pool.shutdown(cancel_futures=True)


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise PipelineError(
            f"{path}: the image cannot be read",
            found=reason(error),
            do="restore it or correct its permissions, then run prepare again",
        ) from error


def recall(path: Path) -> Any:
    """What `remember` wrote there; None where the file is missing or damaged."""
    try:
        head, _, body = path.read_text().partition("\n")
        return json.loads(body) if head == digest(body.encode()) else None
    except (OSError, ValueError):
        return None


def remember(path: Path, value: Any) -> None:
    """Write a JSON value for `recall`, if it is another; a full or read-only disk only costs time later."""
    body = json.dumps(value)
    text = f"{digest(body.encode())}\n{body}"
    with suppress(OSError, ValueError):
        if path.read_text() == text:
            return
    with suppress(PipelineError), atomic_write(path) as temporary:
        temporary.write_text(text)
