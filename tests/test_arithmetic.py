"""Deterministic kernels: only where a training asks for them."""

from typing import Any

import pytest
import torch

from pipeline.common.arithmetic import deterministic_kernels
from pipeline.common.errors import PipelineError


def requested() -> tuple[Any, ...]:
    """The determinism settings of torch."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_all_that_torch_offers_is_on_inside():
    with deterministic_kernels(True):
        assert requested() == (True, True, False)
        assert torch._inductor.config.deterministic
    assert requested() == (False, False, True)


def test_nothing_changes_where_it_is_not_wanted():
    before = requested()
    with deterministic_kernels(False):
        assert requested() == before


def test_it_is_off_again_after_an_error():
    with pytest.raises(KeyError), deterministic_kernels(True):
        raise KeyError
    assert requested() == (False, False, True)


def test_an_operation_without_such_a_kernel_is_an_error_for_users():
    with pytest.raises(PipelineError, match=r"found: +put_ does not have") as caught, deterministic_kernels(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert "set deterministic to false" in str(caught.value)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="no such thing"), deterministic_kernels(True):
        raise RuntimeError("no such thing")
