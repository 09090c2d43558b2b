"""The contract, to the letter, and the shape's arithmetic."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import asymconv
from asymconv.problem import CONTRACT, ConvShape, Model, get_init_inputs, get_inputs


def test_the_contract() -> None:
    (x,) = get_inputs()
    assert x.shape == (8, 64, 512, 1024)
    assert x.dtype == torch.float32
    assert x.min() >= 0 and x.max() < 1
    assert get_init_inputs() == [64, 128, 3]
    model = Model(*get_init_inputs())
    assert isinstance(model.conv2d, nn.Conv2d)
    assert list(model.state_dict()) == ["conv2d.weight"]
    assert tuple(x.shape) == CONTRACT.input_shape


@pytest.mark.parametrize("cls", [asymconv.Model, asymconv.ModelNew])
def test_constructor_signature(cls: type[nn.Module]) -> None:
    parameters = list(inspect.signature(cls).parameters.values())
    assert [(p.name, p.default) for p in parameters] == [
        ("in_channels", inspect.Parameter.empty),
        ("out_channels", inspect.Parameter.empty),
        ("kernel_size", inspect.Parameter.empty),
        ("stride", 1),
        ("padding", 0),
        ("dilation", 1),
        ("groups", 1),
        ("bias", False),
    ]


def test_counts_of_the_contract() -> None:
    assert CONTRACT.flops == 614_856_130_560
    assert CONTRACT.least_bytes == 3_208_953_856
    assert CONTRACT.output_shape == (8, 128, 510, 1022)
    assert CONTRACT.terms == 576


@given(
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    groups=st.integers(1, 3),
)
def test_shape_agrees_with_conv2d(size, kernel, stride, padding, dilation, groups) -> None:
    layer = nn.Conv2d(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias=False)
    x = torch.zeros(1, 2 * groups, *size)
    arguments = (1, 2 * groups, *size, 3 * groups, kernel, stride, padding, dilation, groups)
    try:
        y = layer(x)
    except RuntimeError:
        with pytest.raises(ValueError, match="kernel is larger"):
            ConvShape(*arguments)
        return
    shape = ConvShape(*arguments)
    assert shape.output_shape == tuple(y.shape)
    assert shape.weight_shape == tuple(layer.weight.shape)


def test_flops_by_hand() -> None:
    """2 images, 3 of 4 columns reached, 5 channels out: 2*5*3*3 outputs of 4*2*2 products."""
    shape = ConvShape(2, 4, 4, 4, 5, kernel=2, bias=True)
    assert shape.flops == 2 * (2 * 5 * 3 * 3) * (4 * 2 * 2)
    assert shape.least_bytes == 4 * (2 * 4 * 16 + 5 * 4 * 4 + 5 + 2 * 5 * 9)


@pytest.mark.parametrize(
    "change",
    [{"groups": 3}, {"stride": 0}, {"padding": -1}, {"kernel": (0, 3)}, {"in_channels": 0}],
)
def test_sizes_that_make_no_convolution(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CONTRACT.with_(**change)
