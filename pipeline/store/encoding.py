"""Encoding of the teacher's logits for the store, and decoding.

The kinds, and what a row of a kind's own array holds (its payload):

* `argmax`: nothing more; enough for hard distillation;
* `topk`: 2k + 2 uint16: k classes, the bits of their float16 logits, and of the float32 log-sum-exp of the others;
* `dense8`: classes + 8 uint8: each logit in 256 steps between the row's minimum and maximum, and these two as float32;
* `dense`: a float16 logit per class;
* `sampled`: k uint16: classes drawn from the teacher's softmax at a temperature (pipeline.store.sampling).

The argmax, uint16, is that of the unrounded logits and is stored with every kind.
"""

import math

import numpy as np
import torch

KINDS = ("argmax", "topk", "dense", "dense8", "sampled")
SHARDED = ("dense", "dense8")  # read a few views at a time; the other kinds a block at a time
DTYPES = {"argmax": np.uint16, "topk": np.uint16, "dense": np.float16, "dense8": np.uint8, "sampled": np.uint16}
FILL = 65535  # the number of no class


def payload_width(kind: str, classes: int, k: int) -> int:
    """Numbers per row of a kind's own array, 0 for argmax; with fewer classes than k, topk stores all of them."""
    widths = {"argmax": 0, "topk": 2 * min(k, classes) + 2, "dense": classes, "dense8": classes + 8, "sampled": k}
    return widths[kind]


def classes_per_row(kind: str, width: int) -> int:
    """The k of a payload of topk or sampled; 1 for the other kinds, whose width does not depend on it."""
    return {"topk": (width - 2) // 2, "sampled": width}.get(kind, 1)


def row_bytes(kind: str, classes: int, k: int) -> int:
    """Bytes per row and view: the argmax and the payload."""
    return 2 + payload_width(kind, classes, k) * np.dtype(DTYPES[kind]).itemsize


def encode(
    kind: str, logits: torch.Tensor, top_k: int, samples: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode logits, float32 (rows, classes), as argmax (rows,) and payload (rows, payload_width) or None.

    On the device of the logits. uint16 numbers are int16 with the same bits, since few of torch's operations support
    uint16: see `to_numpy`.

    Args:
        samples: int64 (rows, k), the drawn classes, for sampled.
    """
    argmax = _uint16(logits.argmax(1))
    if kind == "argmax":
        return argmax, None
    if kind == "sampled":
        assert samples is not None, "sampled stores the classes that were drawn"
        return argmax, _uint16(samples)
    if kind == "dense":
        return argmax, logits.half()
    if kind == "dense8":
        return argmax, _levels(logits)
    values, classes = logits.topk(min(top_k, logits.shape[1]), dim=1)
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1).float()
    packed = [_uint16(classes), values.half().view(torch.int16), rest[:, None].view(torch.int16)]
    return argmax, torch.cat(packed, dim=1)


def to_numpy(kind: str, encoded: torch.Tensor) -> np.ndarray:
    """A result of `encode`, moved to the CPU, as an array of the type that the store holds for `kind`."""
    return encoded.numpy().view(DTYPES[kind])


def _uint16(numbers: torch.Tensor) -> torch.Tensor:
    """Integers in 0..65535 as int16 with the same bits."""
    return (numbers - 65536 * (numbers > 32767)).to(torch.int16)


def _levels(logits: torch.Tensor) -> torch.Tensor:
    ends = torch.stack([logits.amin(1), logits.amax(1)], dim=1).float()
    step = (ends[:, 1:] - ends[:, :1]) / 255
    levels = ((logits - ends[:, :1]) / step.clamp(min=1e-30)).round().clamp(0, 255).byte()
    return torch.cat([levels, ends.view(torch.uint8)], dim=1)


def decode_logits(kind: str, payload: torch.Tensor, classes: int) -> torch.Tensor:
    """Decode a payload (rows, payload_width) into logits, float32 (rows, classes), on its device.

    Classes outside the top k get equal logits with the stored log-sum-exp, so the mass of the tail is exact at tau 1.
    The result has the same bits on every device.
    """
    if kind == "dense":
        return payload.float()
    if kind == "dense8":
        least, greatest = _as_floats(payload[:, classes:]).split(1, dim=1)
        # a GPU would replace division by a Python number with multiplication by its reciprocal, which rounds differently
        step = (greatest - least) / torch.full_like(least, 255)
        return least + payload[:, :classes] * step
    top_k, packed = (payload.shape[1] - 2) // 2, payload.view(torch.int16)
    chosen = packed[:, :top_k].long() & 0xFFFF
    values = packed[:, top_k : 2 * top_k].view(torch.float16).float()
    rest = _as_floats(packed[:, 2 * top_k :]) - math.log(max(classes - top_k, 1))
    return rest.repeat(1, classes).scatter_(1, chosen, values)


def decode_samples(payload: torch.Tensor) -> torch.Tensor:
    """Decode a payload of sampled into the drawn classes, int64 (rows, k), on its device."""
    return payload.view(torch.int16).long() & 0xFFFF


def _as_floats(numbers: torch.Tensor) -> torch.Tensor:
    """Reinterpret the bytes of rows as float32; copies, since a row may not be aligned."""
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.float32)
