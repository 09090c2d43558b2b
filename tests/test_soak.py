"""Many calls in a row: fresh data, poisoned outputs, shapes that vary, on one build of a rung."""

from __future__ import annotations

import random

import pytest
import torch

from asymconv import build
from asymconv.check import check
from asymconv.kernels import RUNGS, Rung
from asymconv.problem import ConvShape

CALLS = {"cuda": 1000, "cpu": 12}


def a_shape(draw: random.Random, rung: Rung, backend: str) -> ConvShape:
    """A 3×3 convolution that the rung takes; on a CPU a small one."""
    most = 300 if backend == "cuda" else 150
    while True:
        shape = ConvShape(
            batch=draw.randint(1, 3),
            in_channels=draw.choice([1, 3, 16, 33, 63, 64]),
            height=draw.randint(3, 40 if backend == "cuda" else 8),
            width=draw.randint(3, most),
            out_channels=draw.choice([1, 8, 65, 127, 128, 130]),
            padding=(draw.randint(0, 2), draw.randint(0, 3)),
            bias=draw.random() < 0.5,
        )
        if rung.applies(shape):
            return shape


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.timeout(600))])
@pytest.mark.parametrize(
    "rung",
    [r for r in RUNGS if r.capability >= (8, 0)],
    ids=lambda r: r.name,
)
def test_no_call_goes_wrong(rung: Rung, backend: str) -> None:
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if backend == "cuda" and not rung.runs_on(torch.cuda.get_device_capability()):
        pytest.skip(f"this GPU does not run {rung.name}")
    kernel = build.load(rung, backend)
    draw = random.Random(seed := random.randrange(2**31))
    for call in range(CALLS[backend]):
        try:
            check(kernel, a_shape(draw, rung, backend), backend)
        except AssertionError as wrong:
            pytest.fail(f"shapes of seed {seed}, call {call}: {wrong}")
