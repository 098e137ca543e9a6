"""Atomic save and load of a run's state: weights, optimizer, position.

A checkpoint is a digest followed by a torch archive; the last two are kept. It contains the identity
of its run; a checkpoint of another run is refused, listing the differences.
"""

import contextlib
import hashlib
import io
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.common.errors import PipelineError
from pipeline.common.files import atomic_write
from pipeline.config.validation import differences

KEEP_LAST = 2
WAIT_SECONDS = 60.0  # how long a rank waits for a file that rank 0 sees


def save(folder: Path, step: int, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write `state` as of the start of `step`, atomically, and delete all but the last KEEP_LAST checkpoints.

    Args:
        identity: everything that the run's weights depend on, as JSON values.

    Raises:
        PipelineError: the disk is full or read-only.
    """
    buffer = io.BytesIO()
    torch.save({"step": step, "identity": json.dumps(identity), **state}, buffer)
    payload = buffer.getbuffer()
    with atomic_write(folder / f"step-{step:09d}.ckpt") as temporary, open(temporary, "wb") as file:
        file.write(hashlib.blake2b(payload, digest_size=32).digest())
        file.write(payload)
    for old in _checkpoints(folder)[:-KEEP_LAST]:
        old.unlink(missing_ok=True)


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint's file: its name, and the digest that it begins with, in hex."""

    name: str
    digest: str


def newest(folder: Path) -> CheckpointFile | None:
    """The checkpoint of the largest step, not yet verified; None if there is none."""
    paths = _checkpoints(folder)
    if not paths:
        return None
    with open(paths[-1], "rb") as file:
        return CheckpointFile(paths[-1].name, file.read(32).hex())


def load(folder: Path, identity: dict[str, Any], device: torch.device, file: CheckpointFile) -> dict[str, Any]:
    """The state of a checkpoint, with its `step`; waits for a file that rank 0 sees and this rank does not yet.

    Raises:
        PipelineError: it is damaged, another run's, or does not appear in time.
    """
    path = folder / file.name
    data = _read_when_visible(path, file.digest)
    if hashlib.blake2b(data[32:], digest_size=32).digest() != data[:32]:
        raise PipelineError(
            f"{path}: damaged checkpoint",
            expected="the digest that it begins with",
            found=f"{len(data)} bytes with a different digest",
            do="delete it: the run then resumes from the one before it",
        )
    state = torch.load(io.BytesIO(data[32:]), map_location=device, weights_only=True)
    others = differences(json.loads(state.pop("identity")), json.loads(json.dumps(identity)))
    if others:
        raise PipelineError(
            f"{path}: a checkpoint of another run",
            expected="that of this run",
            found="(there, here) " + "; ".join(others[:8]) + f"; {len(others) - 8} more" * (len(others) > 8),
            do="resume with the settings that it was started with, or move it away: this run cannot resume from it",
        )
    return state


def _read_when_visible(path: Path, digest: str) -> bytes:
    """The contents of the file that begins with a digest; a network file system may show it late."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            start = file.read(32)
            if start.hex() == digest:
                return start + file.read()
        if time.monotonic() > end:
            raise PipelineError(
                f"{path}: not the checkpoint that rank 0 resumes from",
                expected=f"one that begins with {digest}, within {WAIT_SECONDS:.0f} s",
                found="another" if path.exists() else "nothing",
                do="put `work` on a file system where all ranks see the same files",
            )
        time.sleep(0.5)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d{9}\.ckpt", path.name))
