"""How a GPU computes: float32 as it is defined, and the same bits each time where that is asked for."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.common.errors import PipelineError


def use_ieee_float32() -> None:
    """What this process settles before its first operation on a GPU.

    Float32 means IEEE 754's, in matrix products and in convolutions: for these cuDNN takes TF32 unless told otherwise,
    which keeps 10 of the 23 bits of a factor. And cuBLAS gets a workspace with which it repeats its bits, 32 MiB.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, only kernels that give the same bits each time, if so `wanted`.

    That is what torch offers on one kind of GPU with one version of everything: its own kernels, cuDNN's, the
    compiler's, and attention without cuDNN's, which has none; cuBLAS too after `use_ieee_float32`.

    Raises:
        PipelineError: an operation has no such kernel.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    memory.fill_uninitialized_memory = False  # nothing here reads what it did not write
    try:
        yield
    except RuntimeError as error:
        if "torch.use_deterministic_algorithms" not in str(error):
            raise
        raise PipelineError(
            "an operation of this training, with `deterministic` set",
            expected="kernels that give the same bits each time",
            found=str(error).split(", but")[0],
            do="set deterministic to false, or take a model without it",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
        memory.fill_uninitialized_memory = filled
