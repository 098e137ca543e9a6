"""Arithmetic: float32 without TF32, autocast, and deterministic kernels on request."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.common.errors import PipelineError


def use_ieee_float32() -> None:
    """Configure this process before its first GPU operation.

    Matrix products and convolutions of float32 follow IEEE 754: cuDNN's default for convolutions is TF32, which keeps
    10 of the 23 mantissa bits. cuBLAS gets the 32 MiB workspace with which its results are reproducible.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]


AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types of autocast by name; a forward pass in float32 has none."""


def autocast(device: str, precision: str) -> torch.autocast:
    """Autocast of a forward pass on a type of device (cpu, cuda) in a precision: float32, bfloat16 or float16."""
    return torch.autocast(device, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Use only deterministic kernels inside the block, if `wanted`.

    This covers torch's own kernels, cuDNN's, the compiler's and, after `use_ieee_float32`, cuBLAS's; attention avoids
    cuDNN, which has no deterministic kernel for it. Bits are the same for one GPU model and fixed library versions.

    Raises:
        PipelineError: an operation has no deterministic kernel.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    memory.fill_uninitialized_memory = False  # nothing here reads uninitialized memory
    try:
        yield
    except RuntimeError as error:
        if "torch.use_deterministic_algorithms" not in str(error):
            raise
        raise PipelineError(
            "training with `deterministic: true`",
            expected="a deterministic kernel for each operation",
            found=str(error).split(", but")[0],
            do="set deterministic to false, or choose a model without this operation",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
        memory.fill_uninitialized_memory = filled
