"""The layers that a network holds: `Conv2d`, `convert`, and `explain`."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from asymconv.op import conv2d, decide_call

Module = TypeVar("Module", bound=nn.Module)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, run by a rung where that is faster (`asymconv.dispatch`).

    Same arguments, initial weights, state_dict, results under the same PyTorch flags, gradients
    and exceptions. A rung is compiled at its first call (seconds; later processes find it in a
    cache).

    Shapes: input (N, C, H, W) or (C, H, W), output (N, K, OH, OW) or (K, OH, OW).
    Raises what nn.Conv2d raises, for the same arguments and inputs.
    """

    # what nn.Conv2d.forward calls, and what subclasses and patches replace
    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if torch.jit.is_scripting():  # TorchScript compiles PyTorch's own functions
            stride, dilation, groups = self.stride, self.dilation, self.groups
            if self.padding_mode != "zeros":
                sides = self._reversed_padding_repeated_twice
                padded = F.pad(input, sides, mode=self.padding_mode)
                return F.conv2d(padded, weight, bias, stride, (0, 0), dilation, groups)
            return F.conv2d(input, weight, bias, stride, self.padding, dilation, groups)
        else:
            x, padding = _padded(self, input)
            return conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


def _padded(layer: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int] | str]:
    """A layer's input and the zeros it is still to be padded with, as nn.Conv2d does it."""
    if layer.padding_mode == "zeros":
        return x, layer.padding
    sides = layer._reversed_padding_repeated_twice
    return F.pad(x, sides, mode=layer.padding_mode), (0, 0)


def convert(model: Module) -> Module:
    """Make every `nn.Conv2d` of a network an `asymconv.Conv2d`, in place; returns the network.

    The layers stay the same objects: parameters, buffers, hooks, parametrizations, names and the
    train or eval mode are untouched. Subclasses of nn.Conv2d keep their own ways (lazy layers
    too, until their first call has made them an nn.Conv2d), and scripted modules stay as they are.
    Of a compiled module the layers inside are changed, and it compiles anew.

    Args:
        model: any nn.Module, itself an nn.Conv2d too.

    Returns:
        The same object.

    Raises:
        AttributeError: it is no nn.Module.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
        elif parametrize.is_parametrized(module) and type(module).__bases__ == (nn.Conv2d,):
            own = type(module)  # made for this module by torch.nn.utils.parametrize
            members = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(own.__name__, (Conv2d,), members)
    return model


def explain(x: torch.Tensor, layer: nn.Module) -> str:
    """Which kernel a layer would run for this input, under the present flags, and why: one line.

    Builds the kernel if it must, as the call would.

    Args:
        x: the layer's input, (N, C, H, W) or (C, H, W).
        layer: an `asymconv.Conv2d` or `ModelNew`; of an `nn.Conv2d` it says what `convert`
            would change.

    Raises:
        TypeError: no such layer.
        What the layer raises, where its padding mode does not take the input.
    """
    layer = getattr(layer, "conv2d", layer)
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"explain wants a Conv2d layer, not {type(layer).__name__}")
    with torch.no_grad():
        x, padding = _padded(layer, x)
    weight, bias = layer.weight, layer.bias
    decision, *_ = decide_call(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    name = decision.rung.name if decision.rung else "PyTorch's own"
    return f"{name}: {decision.reason.splitlines()[0]}"  # a compiler's lines are in the warning
