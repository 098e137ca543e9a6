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
    """Numbers a row of a kind's own array; 0 for argmax, which needs none. Of fewer classes than top_k all are kept."""
    return {"argmax": 0, "topk": 2 * min(top_k, classes) + 2, "dense": classes, "dense8": classes + 8}[kind]


def row_bytes(kind: str, classes: int, top_k: int) -> int:
    """Bytes of a row in one view: its argmax, and what its kind keeps beside."""
    return 2 + payload_width(kind, classes, top_k) * np.dtype(DTYPES[kind]).itemsize


def encode(kind: str, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float32 logits (rows, classes) as (argmax (rows,), payload (rows, payload_width) or None), on their device.

    uint16 numbers are int16 with the same bits, as few of torch's operations know uint16: see `to_numpy`.
    """
    argmax = _uint16(logits.argmax(1))
    if kind == "argmax":
        return argmax, None
    if kind == "dense":
        return argmax, logits.half()
    if kind == "dense8":
        return argmax, _levels(logits)
    values, classes = logits.topk(min(top_k, logits.shape[1]), dim=1)
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1).float()
    packed = [_uint16(classes), values.half().view(torch.int16), rest[:, None].view(torch.int16)]
    return argmax, torch.cat(packed, dim=1)


def to_numpy(kind: str, encoded: torch.Tensor) -> np.ndarray:
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


def decode_logits(kind: str, payload: torch.Tensor, classes: int) -> torch.Tensor:
    """A payload (rows, width) as float32 logits (rows, classes) on its device, up to what the kind rounds away.

    Classes outside the top k share their log-sum-exp evenly, so the tail's mass is exact at tau 1
    and evenly spread at any other. The same bits on every device.
    """
    if kind == "dense":
        return payload.float()
    if kind == "dense8":
        least, greatest = _as_floats(payload[:, classes:]).split(1, dim=1)
        # by a tensor: a GPU would multiply by the reciprocal of a plain number, which rounds otherwise
        step = (greatest - least) / torch.full_like(least, 255)
        return least + payload[:, :classes] * step
    top_k, packed = (payload.shape[1] - 2) // 2, payload.view(torch.int16)
    chosen = packed[:, :top_k].long() & 0xFFFF
    values = packed[:, top_k : 2 * top_k].view(torch.float16).float()
    rest = _as_floats(packed[:, 2 * top_k :]) - math.log(max(classes - top_k, 1))
    return rest.repeat(1, classes).scatter_(1, chosen, values)


def _as_floats(numbers: torch.Tensor) -> torch.Tensor:
    """The bytes of rows as float32; copied, since a row may begin anywhere in memory."""
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.float32)
