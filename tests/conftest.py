"""What all tests share: backends, and reasons to skip."""

from __future__ import annotations

import pytest
import torch

from asymconv import build


def has_nvcc() -> bool:
    """Whether a CUDA compiler is here; it needs no GPU."""
    try:
        build.cuda_home()
    except build.MissingToolError:
        return False
    return True


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
nvcc = pytest.mark.skipif(not has_nvcc(), reason="no nvcc on this machine")

BACKENDS = ["cpu", pytest.param("cuda", marks=gpu)]
"""Every test of kernels runs its one body on both."""


@pytest.fixture(autouse=True)
def flags():
    """Each test finds and leaves PyTorch's convolution flags as they ship."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.benchmark
    yield
    cudnn.allow_tf32 = True  # the legacy setting cannot be read where the new ones differ from it
    cudnn.conv.fp32_precision, cudnn.benchmark = before


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rungs that were launched, by number."""
    numbers: list[str] = []
    launch = build.Kernel.launch

    def spy(self: build.Kernel, *args: object, **kwargs: object) -> None:
        numbers.append(self.rung.number)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(build.Kernel, "launch", spy)
    return numbers
