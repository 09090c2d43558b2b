"""Rungs built with other tile constants: right, or refused in words, never a launch that fails."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from conftest import nvcc

from asymconv import build
from asymconv.check import check, random_data
from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.problem import ConvShape

SHAPES = [
    ConvShape(1, 3, 9, 37, 5, padding=1, bias=True),
    ConvShape(2, 4, 13, 30, 6, stride=2, padding=(1, 2), groups=2),
    ConvShape(1, 3, 12, 37, 9, kernel=(5, 3), stride=(3, 1), padding=(4, 0), dilation=(2, 3)),
    ConvShape(1, 5, 30, 41, 3, kernel=(2, 4), stride=(1, 3), dilation=(4, 1)),
]

VARIANTS = [(rung, variant) for rung in RUNGS for variant in rung.variants]


def name(value: Rung | Mapping[str, int]) -> str:
    if isinstance(value, Rung):
        return value.number
    return "-".join(str(v) for v in value.values())


@pytest.mark.parametrize(("rung", "variant"), VARIANTS, ids=name)
def test_is_right_or_refuses(rung: Rung, variant: Mapping[str, int]) -> None:
    kernel = build.load(rung, "cpu", defines=variant)
    taken = 0
    for shape in SHAPES:
        if rung.refuses(shape, variant):
            with pytest.raises(ValueError, match=rung.name):
                kernel(*random_data(shape, seed=0), shape)
        else:
            check(kernel, shape)
            taken += 1
    assert taken


def test_a_variant_may_refuse_what_the_rung_takes() -> None:
    rung, wide = get_rung("k04"), {"TILE_H": 4, "TILE_W": 128}
    shape = SHAPES[3]
    assert rung.refuses(shape) is None
    assert "shared memory" in rung.refuses(shape, wide)
    assert rung.refuses(SHAPES[0], wide) is None
    with pytest.raises(KeyError, match="TILE_X"):
        rung.refuses(shape, {"TILE_X": 1})


# k06 takes nvcc ten seconds a variant: the one nearest to 255 registers stands for them; those of
# more warps, to be tried, may spill a little
COMPILED = [
    (rung, variant)
    for rung in RUNGS
    for variant in rung.variants
    if rung.constants(variant) != rung.constants()  # those: test_kernels.py
    and (rung.number != "k06" or variant["WARP_H"] == 4)
]


@nvcc
@pytest.mark.parametrize(("rung", "variant"), COMPILED, ids=name)
def test_compiles_for_hopper_without_spills(rung: Rung, variant: Mapping[str, int]) -> None:
    """But for k04: little in its kernel for 3x3, more in the one for everything else; and for k03
    with several channels in a turn, which is what that costs.
    """
    report = build.compile_report(rung, "90a", variant)
    assert report.kernels
    assert report.warnings == ()
    for kernel in report.kernels:
        most = 0
        if rung.number == "k03":
            most = 96 if rung.constants(variant)["UNROLL_CHANNELS"] > 1 else 0
        if rung.number == "k04":
            most = 16 if "ILb1E" in kernel.function else 96
        assert 0 < kernel.registers <= 255
        assert max(kernel.spill_stores, kernel.spill_loads, kernel.stack) <= most, kernel
