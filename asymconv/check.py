"""Is a result right? The gate that every timing passes first.

A method (a built rung, or a peer such as nn.Conv2d) is run on fresh random data into an output
full of NaN and compared with a convolution in float64, then on integers, where nothing is rounded
and every element must come out exact. What passes is a `Checked`, which `asymconv.measure` asks
for: it names the very build and shape. Methods that are checked side by side on one shape share
their `Expected`: the data and the float64 references, which take longest.
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

    # `makes_output = True`, if it has that, says that it returns a tensor of its own and leaves
    # `out` alone: then none is made for it, which on large shapes would not fit.
    # `mixes_rows = True`, if it has that: see Tolerance.

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
            One wrong tap exceeds it by far, wherever it stands. Where a method adds rows and taps
            before it multiplies (Winograd, F(2, 3) down the rows), each row meets each tap of a
            column, at most twice: the sum is over those (Barabasz et al. 2020, 10.1145/3412380).
        norm: largest ‖y - ref‖ / ‖ref‖ allowed, over all elements. Rounding errors are random
            and mostly cancel, so this is far tighter. It is an average, and holds where many
            roundings are averaged (`MIN_SAMPLES`): a few outputs can all be near zero, a few
            weights can all be rounded far. Where inputs are positive, a filter's roundings add up
            the same way for every pixel: a filter is one sample (`MIN_FILTERS`).
        reason: why these.
    """

    element: float
    norm: float
    reason: str


MIN_SAMPLES, MIN_FILTERS = 4096, 64
"""Outputs and weights, and filters, from which on the norm is checked as well as each element."""


def tolerance(precision: Precision, terms: int) -> Tolerance:
    """The error allowed for outputs that are sums of `terms` products.

    fp32: nothing but the sum rounds, u = 2^-24. A sum in one go over 576 terms measures 4.4e-7
    (figures/data), random errors grow like sqrt(terms) (Higham & Mary 2019, 10.1137/18M1226312).
    tf32: operands keep 10 bits and a half, u = 2^-11 each; tensor cores truncate when they add,
    hence 2^-23 for a term. Two uniform errors of at most 2^-11 have root mean square
    2^-11 * sqrt(2 / 3) = 4.0e-4 for operands at the worst place of a binade; cuDNN measures 2.9e-4.
    fp16: likewise, and the result is rounded once more, 2^-11 or 2^-11 / sqrt(3). For data in
    fp16's normal range, as `random_data` is.
    """
    growth = max(1.0, math.sqrt(terms / 576))
    if precision == "fp32":
        return Tolerance(
            element=1.01 * (terms + 1) * 2.0**-24,
            norm=1e-6 * growth,
            reason="fp32: every sum and product rounded to 24 bits",
        )
    if precision == "fp16":
        return Tolerance(
            element=1.01 * (3 * 2.0**-11 + (terms + 1) * 2.0**-23),
            norm=5e-4,
            reason="fp16: both operands and the result rounded to 11 bits, sums in fp32",
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

    Returns:
        x (N, C, H, W), weight (K, C / groups, R, S), and bias (K,) or None, all float32.
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
    shape: ConvShape,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    bits: int = 24,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Small whole numbers as float32: every product and sum is exact in fp32, TF32 and fp16.

    Args:
        shape: the convolution.
        device: where to.
        seed: None draws a fresh one.
        bits: that hold the largest sum: 24 where sums and results are fp32, 11 for fp16 results.

    Returns:
        x (N, C, H, W), weight (K, C / groups, R, S), and bias (K,) or None, all float32.
    """
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    largest = max(1, min(8, math.isqrt(2**bits // (shape.terms + 1))))

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


KEPT_BYTES, KEPT_SHARE = 16e9, 0.2
"""Of references that an `Expected` keeps, at most: 12 images of the contract's shape; and the share
of a GPU's memory."""


def kept_images(shape: ConvShape, limit: float = KEPT_BYTES) -> int:
    """Images of a batch whose references fit so many bytes: all, an odd number, or none.

    Each has two in float64 and one of integers in float32. Fewer than three are not worth it, but
    for a smaller batch.
    """
    fit = int(limit / max((8 + 8 + 4) * shape.with_(batch=1).outputs, 1))
    if shape.batch <= fit:
        return shape.batch
    odd = fit - (fit % 2 == 0)
    return odd if odd >= 3 else 0


class Expected:
    """What a convolution should give, for methods that are checked side by side.

    float64 convolutions take far longer than what they are compared with, so each is made once and
    kept. Of a batch whose references would be too many (`kept_images`) the images repeat, with an
    odd period, so that an offset that wraps at a power of two still meets another image. Where not
    even three can be kept, none is, and no image repeats.

    Args:
        shape: the convolution.
        device: where.
        seed: of the random data; None draws a fresh one.
        keep: False makes each reference anew, and repeats no image: for a single method.
    """

    def __init__(
        self,
        shape: ConvShape,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        keep: bool = True,
    ) -> None:
        self.shape, self.device = shape, device
        self.seed = torch.Generator().seed() % 2**31 if seed is None else seed
        limit = KEPT_BYTES
        if torch.device(device).type == "cuda":
            limit = min(limit, KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory)
        kept = kept_images(shape, limit) if keep else 0
        self.keep, self.images = kept > 0, kept or shape.batch
        self._kept: dict[tuple[str, int], tuple[torch.Tensor, ...]] = {}

    def random(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`random_data`, the same at every call; its shapes are given there."""
        return self._repeated(random_data(self.shape, self.device, self.seed))

    def integers(self, bits: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`integer_data`, the same at every call; its shapes are given there."""
        return self._repeated(integer_data(self.shape, self.device, self.seed + 1, bits))

    def _repeated(
        self, data: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x = data[0]
        for first in range(self.images, self.shape.batch, max(1, self.images)):
            part = x[first : first + self.images]
            part.copy_(x[: len(part)])
        return data

    def of_random(
        self,
        n: int,
        data: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        mixes_rows: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image n of `random` convolved in float64, and the sums of its terms' magnitudes.

        data: what `random` gave. mixes_rows: of each row with each tap, twice. Both results are
        (1, K, OH, OW).
        """
        x, weight, bias = data[0][n : n + 1], *data[1:]

        def sizes(taps: torch.Tensor) -> torch.Tensor:
            return reference(x.abs(), taps, None if bias is None else bias.abs(), self.shape)

        key = ("random", n % self.images)
        kept = self._kept.get(key) or (reference(x, weight, bias, self.shape), sizes(weight.abs()))
        if self.keep:
            self._kept[key] = kept
        if not mixes_rows:
            return kept  # type: ignore[return-value]
        # for one rung: not kept, which would be half as much again
        return kept[0], sizes(2 * weight.abs().sum(2, keepdim=True).expand_as(weight))

    def of_integers(
        self, n: int, bits: int, data: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    ) -> torch.Tensor:
        """Image n of `integers` convolved, exact, as float32: (1, K, OH, OW).

        bits, data: what `integers` was asked for, and gave.
        """
        key = (f"integers of {bits} bits", n % self.images)
        if key in self._kept:
            return self._kept[key][0]
        ref = reference(data[0][n : n + 1], *data[1:], self.shape).float()
        if self.keep:
            self._kept[key] = (ref,)
        return ref


def _compare(
    y: torch.Tensor,
    data: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    expected: Expected,
    element: float,
    mixes_rows: bool,
) -> tuple[float, float]:
    """(worst element error over the allowed one, ‖y - ref‖ / ‖ref‖), image by image."""
    worst, squares, total = 0.0, 0.0, 0.0
    for n in range(expected.shape.batch):  # an image at a time: float64 of the whole would not fit
        ref, size = expected.of_random(n, data, mixes_rows)
        difference = (y[n : n + 1].double() - ref).abs_()
        squares += difference.square().sum().item()
        total += ref.square().sum().item()
        # 1e-300: where nothing is summed, nothing but zero is right, and 0 / 0 must not pass
        ratio = (difference / (element * size + 1e-300)).max().item()
        worst = ratio if not ratio <= worst else worst  # NaN stays
    return worst, math.sqrt(squares / total) if total else math.sqrt(squares)


def check(
    method: Method,
    shape: ConvShape,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    expected: Expected | None = None,
) -> Checked:
    """Run a method against float64 and on integers.

    Args:
        method: what to check.
        shape: the convolution; the batch may be empty.
        device: where.
        seed: of the random data; None draws a fresh one, which the message of a failure names.
        expected: of this shape, shared with other methods; then its device and seed count.

    Raises:
        AssertionError: it is wrong; says where, by how much, and the seed.
        ValueError: what is expected is of another shape.
    """
    expected = expected or Expected(shape, device, seed, keep=False)
    if expected.shape != shape:
        raise ValueError(f"expected is of {expected.shape}, not of {shape}")
    where = f"{method.key} on {shape}, seed {expected.seed}"
    allowed = tolerance(method.precision, shape.terms)
    bits = 11 if method.precision == "fp16" else 24

    def run(data: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        out = None
        if not getattr(method, "makes_output", False):
            out = torch.full(
                shape.output_shape, math.nan, dtype=torch.float32, device=expected.device
            )
        y = method(*data, shape, out=out)
        assert tuple(y.shape) == shape.output_shape, f"{where}: shape {tuple(y.shape)}"
        assert y.dtype == torch.float32, f"{where}: {y.dtype}"
        return y

    data = expected.random()
    y = run(data)
    worst, error = _compare(
        y, data, expected, allowed.element, getattr(method, "mixes_rows", False)
    )
    assert worst <= 1.0, (
        f"{where}: an element is off by {worst:.3g} times what is allowed "
        f"({allowed.reason}); {int(y.isnan().sum())} of {y.numel()} elements are NaN"
    )
    samples = min(shape.outputs, math.prod(shape.weight_shape))
    if samples >= MIN_SAMPLES and shape.out_channels >= MIN_FILTERS:
        assert error <= allowed.norm, f"{where}: error {error:.3g}, allowed {allowed.norm:.3g}"
    del y, data

    data = expected.integers(bits)
    y = run(data)
    for n in range(shape.batch):
        ref = expected.of_integers(n, bits, data)
        wrong = int((y[n : n + 1] != ref).sum())  # NaN differs from everything
        assert wrong == 0, f"{where}: {wrong} elements of image {n} are not exact on integers"
    return Checked(method.key, shape, error, worst, shape.outputs)
