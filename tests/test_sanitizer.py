"""compute-sanitizer on every rung, at small odd shapes: on a GPU, where the tool is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import gpu

from asymconv import build
from asymconv.kernels import RUNGS


def sanitizer() -> str | None:
    """The tool on PATH or in the CUDA folder."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    try:
        beside = build.cuda_home() / "bin" / "compute-sanitizer"
    except build.MissingToolError:
        return None
    return str(beside) if beside.exists() else None


@gpu
@pytest.mark.skipif(sanitizer() is None, reason="no compute-sanitizer on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_finds_nothing(tool: str) -> None:
    # racecheck does not know mbarriers: of k07 and k08 it reports what goes through shared memory
    # and is ordered by one. The CPU backend knows them and looks for races (test_kernels.py).
    kernels = [r for r in RUNGS if tool != "racecheck" or r.arch != "90a"]
    build.load_all([(rung, {}) for rung in kernels])  # not under the tool
    numbers = [rung.name for rung in kernels]
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "3"]
    command += [sys.executable, str(Path(__file__).with_name("sanitized.py")), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    told = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, told
    assert "0 errors" in told or "0 hazards" in told, told
    assert all(f"{number} ran" in done.stdout for number in numbers), told


def test_what_runs_under_it_is_right_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own shapes and comparison, with the CUDA text on the CPU."""
    import sanitized
    import torch

    load = build.load
    monkeypatch.setattr(build, "load", lambda rung, backend: load(rung, "cpu"))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    sanitized.main(["k03", "k07"])
    right = sanitized.check.reference
    monkeypatch.setattr(sanitized.check, "reference", lambda *data: 1.01 * right(*data))
    with pytest.raises(AssertionError):
        sanitized.main(["k03"])
