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


def encode(kind: str, logits: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Float32 logits (rows, classes) on any device as (argmax uint16 (rows,), payload or None).

    The payload is (rows, payload_width) of DTYPES[kind].
    """
    argmax = logits.argmax(1).cpu().numpy().astype(np.uint16)
    if kind == "argmax":
        return argmax, None
    if kind == "dense":
        return argmax, logits.half().cpu().numpy()
    if kind == "dense8":
        return argmax, _bytes(logits)
    values, classes = logits.topk(top_k, dim=1)
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1)
    packed = [
        classes.cpu().numpy().astype(np.uint16),
        values.half().cpu().numpy().view(np.uint16),
        rest.float().cpu().numpy()[:, None].view(np.uint16),
    ]
    return argmax, np.concatenate(packed, axis=1)


def _bytes(logits: torch.Tensor) -> np.ndarray:
    ends = torch.stack([logits.amin(1), logits.amax(1)], dim=1).float()
    step = (ends[:, 1:] - ends[:, :1]) / 255
    levels = ((logits - ends[:, :1]) / step.clamp(min=1e-30)).round().clamp(0, 255).byte()
    return np.concatenate([levels.cpu().numpy(), ends.cpu().numpy().view(np.uint8)], axis=1)


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
