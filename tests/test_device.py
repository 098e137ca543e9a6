"""The device that a command takes: torch's own functions are asked, as far as a machine without a GPU lets them."""

import os

import pytest
import torch

from pipeline.cli.options import find_device


@pytest.fixture
def two_gpus(monkeypatch) -> list[int]:
    """A machine that seems to have two GPUs. Returns the numbers that were made current ones."""
    made_current, real = [], torch.empty

    def empty(*size: int, device: torch.device) -> torch.Tensor:
        if (device.index or 0) > 1:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return real(*size)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made_current.append, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return made_current


@pytest.mark.parametrize(("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_without_torchrun_becomes_the_current_one(two_gpus, name, number):
    assert find_device(name) == torch.device("cuda", number)
    assert two_gpus == [number]


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_under_torchrun_it_is_the_local_ranks(two_gpus, monkeypatch, name):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device(name) == torch.device("cuda", 1)
    assert two_gpus == [1]


def test_a_cpu_may_be_asked_for_where_there_are_gpus(two_gpus):
    assert find_device("cpu") == torch.device("cpu")
    assert not two_gpus


def test_float32_is_never_tf32():
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    matmul.fp32_precision = convolutions.fp32_precision = "tf32"
    find_device("cpu")
    assert (matmul.fp32_precision, convolutions.fp32_precision) == ("ieee", "ieee")


def test_cublas_is_told_to_repeat_its_bits_before_it_is_used(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    find_device("cpu")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
