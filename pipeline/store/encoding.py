"""Encoding of the teacher's logits for the store, and decoding; see `pipeline.store.kinds` for the kinds."""

import math

import numpy as np
import torch

from pipeline.store.kinds import KINDS


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
    return encoded.numpy().view(KINDS[kind].dtype)


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
