"""What a teacher said about a group: encoding for the store, and back to log-probabilities.

Kinds, with the numbers that a row of a kind's own array holds:

* `argmax`: uint16, all that hard distillation needs;
* `topk`: uint16 of 2k + 2: k classes, k float16 logits' bits, the float32 log-sum-exp of the others;
* `dense8`: uint8 of classes + 8: each logit between the row's least and greatest, and these two as float32;
* `dense`: float16, every class.

The argmax comes from the unrounded logits and is stored with every kind.
"""

import math

import numpy as np
import torch

KINDS = ("argmax", "topk", "dense", "dense8")
SHARDED = ("dense", "dense8")  # read a few views at a time; the others a block at once
DTYPES = {"argmax": np.uint16, "topk": np.uint16, "dense": np.float16, "dense8": np.uint8}
FILL = 65535  # no class has this number, and no answer these bits


def payload_width(kind: str, classes: int, top_k: int) -> int:
    """Numbers a row of a kind's own array; 0 for argmax, which needs none."""
    return {"argmax": 0, "topk": 2 * top_k + 2, "dense": classes, "dense8": classes + 8}[kind]


def row_bytes(kind: str, classes: int, top_k: int) -> int:
    """Bytes of a row in one view: its argmax, and what its kind keeps beside."""
    return 2 + payload_width(kind, classes, top_k) * np.dtype(DTYPES[kind]).itemsize


def encode(kind: str, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float32 logits (rows, classes) as (argmax (rows,), payload (rows, payload_width) or None), on their device.

    uint16 numbers are int16 with the same bits, as few of torch's operations know uint16: see `as_stored`.
    """
    argmax = _uint16(logits.argmax(1))
    if kind == "argmax":
        return argmax, None
    if kind == "dense":
        return argmax, logits.half()
    if kind == "dense8":
        return argmax, _levels(logits)
    values, classes = logits.topk(top_k, dim=1)
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1).float()
    packed = [_uint16(classes), values.half().view(torch.int16), rest[:, None].view(torch.int16)]
    return argmax, torch.cat(packed, dim=1)


def as_stored(kind: str, encoded: torch.Tensor) -> np.ndarray:
    """What `encode` gave, on the CPU, with the store's type of the kind's own array."""
    return encoded.numpy().view(DTYPES[kind])


def _uint16(numbers: torch.Tensor) -> torch.Tensor:
    """Integers in 0..65535 as int16 of the same bits."""
    return (numbers - 65536 * (numbers > 32767)).to(torch.int16)


def _levels(logits: torch.Tensor) -> torch.Tensor:
    ends = torch.stack([logits.amin(1), logits.amax(1)], dim=1).float()
    step = (ends[:, 1:] - ends[:, :1]) / 255
    levels = ((logits - ends[:, :1]) / step.clamp(min=1e-30)).round().clamp(0, 255).byte()
    return torch.cat([levels, ends.view(torch.uint8)], dim=1)


def decode_logits(kind: str, payload: np.ndarray, classes: int) -> np.ndarray:
    """A payload (rows, width) as float32 logits (rows, classes), up to what the kind rounds away.

    Classes outside the top k share their log-sum-exp evenly, so the tail's mass is exact at tau 1
    and evenly spread at any other.
    """
    if kind == "dense":
        return payload.astype(np.float32)
    if kind == "dense8":
        ends = np.ascontiguousarray(payload[:, classes:]).view(np.float32)
        return ends[:, :1] + payload[:, :classes] * ((ends[:, 1:] - ends[:, :1]) / np.float32(255))
    top_k = (payload.shape[1] - 2) // 2
    packed = np.ascontiguousarray(payload)
    chosen = packed[:, :top_k].astype(np.int64)
    values = np.ascontiguousarray(packed[:, top_k : 2 * top_k]).view(np.float16).astype(np.float32)
    rest = np.ascontiguousarray(packed[:, 2 * top_k :]).view(np.float32)
    logits = np.repeat(rest - math.log(max(classes - top_k, 1)), classes, axis=1)
    np.put_along_axis(logits, chosen, values, axis=1)
    return logits


def log_probabilities(kind: str, payload: np.ndarray, classes: int, tau: float) -> np.ndarray:
    """log softmax(logits / tau) of a payload (rows, width), float32 (rows, classes).

    Of a top k the tail is accounted for: exactly in its mass at tau 1, as if spread evenly over the
    other classes at any other tau.
    """
    logits = decode_logits(kind, payload, classes) / np.float32(tau)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
