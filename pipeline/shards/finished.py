"""Results of an unfinished indexing, one file per completed shard, so that it can resume.

The files are written by the processes that index, are complete or absent, and are deleted once there is an index.
"""

import base64
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from pipeline.config.validation import fingerprint
from pipeline.shards.contents import load_cache, save_cache
from pipeline.shards.index_file import ShardIndex, row_type

INDEXING_VERSION = 2  # bump when indexing the same shard yields different rows, or refuses different images


@dataclass(frozen=True)
class Finished:
    """What indexing a shard yielded, and the shard's signature from before it was read; None if it had none."""

    shard: ShardIndex
    signature: Any


def indexing_settings(*settings: Any) -> str:
    """A fingerprint of everything but the shard that indexing depends on: settings, this code and the decoder."""
    return fingerprint([INDEXING_VERSION, PIL.__version__, *settings])


def save_finished(folder: Path, settings: str, shard: ShardIndex, signature: Any) -> None:
    """Keep a shard's result; a full or read-only disk only costs time later.

    Args:
        settings: from `indexing_settings`.
    """
    save_cache(
        _file(folder, shard.name),
        {
            "settings": settings,
            "signature": signature,
            "name": shard.name,
            "bytes": shard.bytes,
            "sha256": shard.sha256,
            "content": shard.content,
            "refused": shard.refused,
            "key_length": shard.rows.dtype["key"].itemsize,
            "rows": base64.b64encode(shard.rows.tobytes()).decode(),
        },
    )


def load_finished(folder: Path, settings: str, name: str) -> Finished | None:
    """A shard's kept result; None if there is none, it is damaged, or it was made with other settings."""
    kept = load_cache(_file(folder, name))
    if kept is None or (kept["settings"], kept["name"]) != (settings, name):
        return None
    rows = np.frombuffer(base64.b64decode(kept["rows"]), row_type(kept["key_length"]))
    shard = ShardIndex(name, rows, kept["bytes"], kept["sha256"], kept["content"], kept["refused"])
    return Finished(shard, kept["signature"])


def remove_finished(folder: Path) -> None:
    """Delete all results that were kept."""
    shutil.rmtree(folder, ignore_errors=True)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
