"""Atomic save and load of everything that a run is: weights, optimizer, position.

A checkpoint is a digest followed by a torch archive; the last two are kept. It carries the identity
of its run, and another's is refused with what differs.
"""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import PipelineError
from pipeline.files import replacing
from pipeline.strict import differences

KEPT = 2


def save(folder: Path, step: int, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write `state` as of the start of `step`, whole or not at all; older ones but one go.

    Args:
        identity: what the run's weights depend on, as JSON values.

    Raises:
        PipelineError: the disk is full or read-only.
    """
    buffer = io.BytesIO()
    torch.save({"step": step, "identity": json.dumps(identity), **state}, buffer)
    payload = buffer.getbuffer()
    with replacing(folder / f"step-{step:09d}.ckpt") as temporary, open(temporary, "wb") as file:
        file.write(hashlib.blake2b(payload, digest_size=32).digest())
        file.write(payload)
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)


def load(folder: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The newest checkpoint's state with its `step`, or None where there is none.

    Raises:
        PipelineError: the newest one is damaged, or another run's.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    data = path.read_bytes()
    if hashlib.blake2b(data[32:], digest_size=32).digest() != data[:32]:
        raise PipelineError(
            f"{path}: damaged checkpoint",
            expected="the digest that it begins with",
            found=f"{len(data)} bytes with another",
            do="delete it: the run goes on from the one before it",
        )
    state = torch.load(io.BytesIO(data[32:]), map_location=device, weights_only=True)
    others = differences(json.loads(state.pop("identity")), json.loads(json.dumps(identity)))
    if others:
        raise PipelineError(
            f"{path}: a checkpoint of another run",
            expected="that of this run",
            found="(there, here) " + "; ".join(others[:8]) + f"; {len(others) - 8} more" * (len(others) > 8),
            do="go on as it was begun, or move it away: this run cannot go on from it",
        )
    return state


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d{9}\.ckpt", path.name))
