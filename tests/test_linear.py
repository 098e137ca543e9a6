"""Linear layers computed by oneDNN: values and gradients are those of torch up to rounding."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.config.schema import Recipe, Student
from pipeline.models.build import build_student
from pipeline.models.linear import OneDNNLinear, convert_linear, uses_onednn


def pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """torch's layer, and ours with the same weights."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias)
    ours = copy.deepcopy(plain)
    convert_linear(ours)
    return plain, ours


SIZES = st.integers(1, 40)


@given(batch=st.integers(1, 4), tokens=SIZES, inputs=SIZES, outputs=SIZES, bias=st.booleans())
def test_values_and_gradients_are_those_of_a_linear_layer(batch, tokens, inputs, outputs, bias):
    x, found = torch.randn(batch, tokens, inputs), []
    for layer in pair(inputs, outputs, bias):
        given_x = x.clone().requires_grad_()
        y = layer(given_x)
        y.square().sum().backward()
        found.append([y, given_x.grad, *(parameter.grad for parameter in layer.parameters())])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
        assert ours.is_contiguous()


@pytest.mark.parametrize("x", [torch.rand(2, 3), torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 2, 2, 3)])
def test_other_inputs_go_torchs_own_way(x):
    assert not uses_onednn(x)


def test_autocast_goes_torchs_own_way():
    plain, ours = pair(6, 5, True)
    x = torch.rand(2, 3, 6)
    assert uses_onednn(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_onednn(x)
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_student_compiles_into_one_graph(bf16):
    model = build_student(Student(kwargs={"embed_dim": 16, "num_heads": 1, "depth": 1}), Recipe(), 5, 16).eval()
    pictures = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        torch.testing.assert_close(compiled(pictures), model(pictures))


def test_weights_copies_and_repeats_are_as_before():
    plain, ours = pair(6, 5, True)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    twice = copy.deepcopy(ours)
    convert_linear(twice)
    assert type(twice) is OneDNNLinear
    x = torch.rand(2, 3, 6)
    assert torch.equal(twice(x), ours(x))


def test_a_students_layers_are_all_ours():
    model = build_student(Student(), Recipe(), 5, 16)
    assert {type(part) for part in model.modules() if isinstance(part, nn.Linear)} == {OneDNNLinear}
