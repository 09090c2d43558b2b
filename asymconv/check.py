"""Is a result right? The gate that every timing passes first.

A method (a built rung, or a peer such as nn.Conv2d) is run on fresh random data into an output
full of NaN and compared with a convolution in float64, then on integers, where nothing is rounded
and every element must come out exact. What passes is a `Checked`, which `asymconv.measure` asks
for: it names the very build and shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from asymconv.kernels import Precision
from asymconv.problem import ConvShape


class Method(Protocol):
    """Something that convolves: a `build.Kernel` or a `measure.Peer`."""

    @property
    def key(self) -> str:
        """Names this very build."""

    @property
    def precision(self) -> Precision:
        """The class of its rounding."""

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: ConvShape,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Convolve."""


@dataclass(frozen=True)
class Tolerance:
    """The error allowed, and why.

    Attributes:
        element: largest absolute error allowed, over the sum of abs(x) abs(w) of that element.
            A bound that no correct implementation can exceed: each operand is rounded with
            relative error at most u, and summing n terms in any order costs at most n rounding
            errors (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5).
            One wrong tap exceeds it by far, wherever it stands.
        norm: largest ‖y - ref‖ / ‖ref‖ allowed, over all elements. Rounding errors are random
            and mostly cancel, so this is far tighter. It is an average, and holds where many
            roundings are averaged (`MIN_SAMPLES`): a few outputs can all be near zero, a few
            weights can all be rounded far.
        reason: why these.
    """

    element: float
    norm: float
    reason: str


MIN_SAMPLES = 4096
"""Outputs and weights from which on the norm is checked as well as each element."""


def tolerance(precision: Precision, terms: int) -> Tolerance:
    """The error allowed for outputs that are sums of `terms` products.

    fp32: nothing but the sum rounds, u = 2^-24. A sum in one go over 576 terms measures 4.4e-7
    (figures/data), random errors grow like sqrt(terms) (Higham & Mary 2019, 10.1137/18M1226312).
    tf32: operands keep 10 bits and a half, u = 2^-11 each; tensor cores truncate when they add,
    hence 2^-23 for a term. Two uniform errors of at most 2^-11 have root mean square
    2^-11 * sqrt(2 / 3) = 4.0e-4 for operands at the worst place of a binade; cuDNN measures 2.9e-4.
    """
    growth = max(1.0, math.sqrt(terms / 576))
    if precision == "fp32":
        return Tolerance(
            element=1.01 * (terms + 1) * 2.0**-24,
            norm=1e-6 * growth,
            reason="fp32: every sum and product rounded to 24 bits",
        )
    return Tolerance(
        element=1.01 * (2 * 2.0**-11 + (terms + 1) * 2.0**-23),
        norm=4e-4,
        reason="tf32: both operands rounded to 11 bits, sums in fp32",
    )


@dataclass(frozen=True)
class Checked:
    """Proof that a method was right on a shape. Made by `check` alone.

    Attributes:
        key: the method's build.
        shape: the convolution.
        error: ‖y - ref‖ / ‖ref‖ against float64, on data like the contract's.
        worst: largest element error over what is allowed; at most 1.
        elements: outputs compared.
    """

    key: str
    shape: ConvShape
    error: float
    worst: float
    elements: int


def random_data(
    shape: ConvShape, device: torch.device | str = "cpu", seed: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x uniform on [0, 1) as the contract has it; weight and bias as nn.Conv2d draws them.

    Args:
        shape: the convolution.
        device: where to.
        seed: None draws a fresh one.
    """
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    limit = 1 / math.sqrt(shape.terms)

    def uniform(size: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        tensor = torch.empty(size, dtype=torch.float32, device=device)
        return tensor.uniform_(low, high, generator=generator)

    x = uniform(shape.input_shape, 0.0, 1.0)
    weight = uniform(shape.weight_shape, -limit, limit)
    return x, weight, uniform((shape.out_channels,), -limit, limit) if shape.bias else None


def integer_data(
    shape: ConvShape, device: torch.device | str = "cpu", seed: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Small whole numbers as float32: every product and sum is exact in fp32, TF32 and fp16."""
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    largest = max(1, min(8, math.isqrt(2**24 // (shape.terms + 1))))

    def whole(size: tuple[int, ...]) -> torch.Tensor:
        kw = {"generator": generator, "device": device, "dtype": torch.float32}
        return torch.randint(-largest, largest + 1, size, **kw)

    bias = whole((shape.out_channels,)) if shape.bias else None
    return whole(shape.input_shape), whole(shape.weight_shape), bias


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape
) -> torch.Tensor:
    """The convolution of one batch in float64, (N, K, OH, OW)."""
    bias64 = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias64, **shape.conv_args())


def _compare(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: ConvShape,
    element: float,
) -> tuple[float, float]:
    """(worst element error over the allowed one, ‖y - ref‖ / ‖ref‖), image by image."""
    worst, squares, total = 0.0, 0.0, 0.0
    for n in range(shape.batch):  # an image at a time: float64 of the whole would not fit
        image = slice(n, n + 1)
        ref = reference(x[image], weight, bias, shape)
        size = reference(x[image].abs(), weight.abs(), None if bias is None else bias.abs(), shape)
        difference = (y[image].double() - ref).abs_()
        squares += difference.square().sum().item()
        total += ref.square().sum().item()
        # 1e-300: where nothing is summed, nothing but zero is right, and 0 / 0 must not pass
        ratio = (difference / (element * size + 1e-300)).max().item()
        worst = ratio if not ratio <= worst else worst  # NaN stays
    return worst, math.sqrt(squares / total) if total else math.sqrt(squares)


def check(
    method: Method, shape: ConvShape, device: torch.device | str = "cpu", seed: int | None = None
) -> Checked:
    """Run a method against float64 and on integers.

    Args:
        method: what to check.
        shape: the convolution; the batch may be empty.
        device: where.
        seed: of the random data; None draws a fresh one, which the message of a failure names.

    Raises:
        AssertionError: it is wrong; says where, by how much, and the seed.
    """
    seed = torch.Generator().seed() % 2**31 if seed is None else seed
    where = f"{method.key} on {shape}, seed {seed}"
    allowed = tolerance(method.precision, shape.terms)

    def run(data: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        out = torch.full(shape.output_shape, math.nan, dtype=torch.float32, device=device)
        y = method(*data, shape, out=out)
        assert tuple(y.shape) == shape.output_shape, f"{where}: shape {tuple(y.shape)}"
        return y

    data = random_data(shape, device, seed)
    y = run(data)
    worst, error = _compare(y, *data, shape, allowed.element)
    assert worst <= 1.0, (
        f"{where}: an element is off by {worst:.3g} times what is allowed "
        f"({allowed.reason}); {int(y.isnan().sum())} of {y.numel()} elements are NaN"
    )
    if min(shape.outputs, math.prod(shape.weight_shape)) >= MIN_SAMPLES:
        assert error <= allowed.norm, f"{where}: error {error:.3g}, allowed {allowed.norm:.3g}"
    del y

    data = integer_data(shape, device, seed + 1)
    y = run(data)
    for n in range(shape.batch):
        ref = reference(data[0][n : n + 1], data[1], data[2], shape).float()
        wrong = int((y[n : n + 1] != ref).sum())  # NaN differs from everything
        assert wrong == 0, f"{where}: {wrong} elements of image {n} are not exact on integers"
    return Checked(method.key, shape, error, worst, shape.outputs)
