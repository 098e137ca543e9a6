"""What a teacher said about a group: encoding for the store, and back to log-probabilities.

Kinds: `argmax` uint16, all that hard distillation needs; `topk` uint16 of 2k + 2 (k classes, k
float16 logits' bits, the float32 log-sum-exp of the other classes); `dense` float16, every class.
The argmax comes from the unrounded logits and is stored with every kind.
"""

import math

import numpy as np
import torch

KINDS = ("argmax", "topk", "dense")
FILL = 65535  # no class has this number, and no answer these bits


def payload_width(kind: str, classes: int, top_k: int) -> int:
    """Numbers a row of a kind's own array; 0 for argmax, which needs none."""
    return {"argmax": 0, "topk": 2 * top_k + 2, "dense": classes}[kind]


def encode(kind: str, logits: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Float32 logits (rows, classes) on any device as (argmax uint16 (rows,), payload or None).

    The payload is uint16 (rows, 2k + 2) for topk, float16 (rows, classes) for dense.
    """
    argmax = logits.argmax(1).cpu().numpy().astype(np.uint16)
    if kind == "argmax":
        return argmax, None
    if kind == "dense":
        return argmax, logits.half().cpu().numpy()
    values, classes = logits.topk(top_k, dim=1)
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1)
    packed = [
        classes.cpu().numpy().astype(np.uint16),
        values.half().cpu().numpy().view(np.uint16),
        rest.float().cpu().numpy()[:, None].view(np.uint16),
    ]
    return argmax, np.concatenate(packed, axis=1)


def decode_logits(kind: str, payload: np.ndarray, classes: int) -> np.ndarray:
    """A payload (rows, width) as float32 logits (rows, classes), up to what the kind rounds away.

    Classes outside the top k share their log-sum-exp evenly, so the tail's mass is exact at tau 1
    and evenly spread at any other.
    """
    if kind == "dense":
        return payload.astype(np.float32)
    top_k = (payload.shape[1] - 2) // 2
    packed = np.ascontiguousarray(payload)
    chosen = packed[:, :top_k].astype(np.int64)
    values = np.ascontiguousarray(packed[:, top_k : 2 * top_k]).view(np.float16).astype(np.float32)
    rest = np.ascontiguousarray(packed[:, 2 * top_k :]).view(np.float32)
    logits = np.repeat(rest - math.log(max(classes - top_k, 1)), classes, axis=1)
    np.put_along_axis(logits, chosen, values, axis=1)
    return logits
