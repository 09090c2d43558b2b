"""Run by test_sanitizer.py under compute-sanitizer: rungs on small odd shapes, compared on the CPU.

Nothing but copies and the rungs' own kernels runs on the GPU, so what is reported is theirs.
"""

from __future__ import annotations

import math
import sys

import torch

from asymconv import build, check
from asymconv.kernels import get_rung
from asymconv.problem import ConvShape

SHAPES = [
    ConvShape(2, 3, 7, 13, 5),
    ConvShape(3, 4, 5, 9, 6, padding=1, bias=True),
    ConvShape(2, 6, 9, 14, 4, stride=2, padding=(1, 2), groups=2),
    ConvShape(2, 5, 12, 37, 9, kernel=(5, 3), stride=(3, 1), padding=(4, 0), dilation=(2, 3)),
    ConvShape(1, 20, 9, 140, 70, padding=1, bias=True),
    ConvShape(2, 10, 7, 133, 6, padding=(0, 2), groups=2),
    ConvShape(1, 64, 6, 264, 128),  # several strips, all channels and filters
]


def main(numbers: list[str]) -> None:
    """Check these rungs; raises AssertionError."""
    for number in numbers:
        rung = get_rung(number)
        kernel = build.load(rung, "cuda")
        for shape in (s for s in SHAPES if rung.applies(s)):
            x, weight, bias = check.random_data(shape)
            data = [None if t is None else t.cuda() for t in (x, weight, bias)]
            out = torch.full(shape.output_shape, math.nan).cuda()
            y = kernel(*data, shape, out=out).cpu().double()
            wanted = check.reference(x, weight, bias, shape)
            error = ((y - wanted).norm() / wanted.norm()).item()
            # few terms and outputs: twice what the class has on average
            assert error <= 2 * check.tolerance(rung.precision, shape.terms).norm, (number, shape)
        print(f"{number} ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
