"""The build: cache, locks, errors. The CUDA bodies run where there is a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS, nvcc

from asymconv import build
from asymconv.check import check
from asymconv.kernels import get_rung
from asymconv.problem import ConvShape

SHAPE = ConvShape(2, 3, 5, 9, 4)
RUNG = get_rung("k02")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has loaded nothing."""
    monkeypatch.setenv("ASYMCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    return tmp_path / "cache"


LOAD = """
import sys, time
from asymconv import build
from asymconv.kernels import get_rung
began = time.perf_counter()
kernel = build.load(get_rung("k02"), sys.argv[1])
print(f"{time.perf_counter() - began:.3f} {kernel.path}")
"""


def start(backend: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOAD, backend]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[float, str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    seconds, path = out.strip().splitlines()[-1].split(" ", 1)
    return float(seconds), path


def builds(cache: Path) -> list[str]:
    """Of kernels; what they are linked with, on a CPU, is another folder, or none."""
    folders = [p.name for p in cache.iterdir() if p.is_dir() and p.name != "lib"]
    assert sum(name.startswith("emulator-") for name in folders) <= 1
    return sorted(name for name in folders if not name.startswith("emulator-"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_process_takes_the_build_from_the_cache(cache: Path, backend: str) -> None:
    first, path = finish(start(backend))
    built = os.stat(path).st_mtime_ns
    again, same = finish(start(backend))
    assert path == same and os.stat(path).st_mtime_ns == built
    assert again < 1.0, f"{again} s from the cache, {first} s to build"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_build_at_once(cache: Path, backend: str) -> None:
    results = [finish(p) for p in [start(backend), start(backend)]]
    assert results[0][1] == results[1][1]
    assert len(builds(cache)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_build_does_not_stop_the_next(cache: Path, backend: str) -> None:
    process = start(backend)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "it built before it could be killed"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seconds, path = finish(start(backend))
    assert Path(path).exists() and seconds < 120
    assert not list(cache.glob("*.tmp-*")), "the killed build's folder is still there"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_source_or_constant_builds_anew(cache: Path, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    check(build.load(RUNG, backend), SHAPE, device)
    wrong = replace(RUNG, source=RUNG.source.replace("sum += xv * wv", "sum += xv * wv * 2.0f"))
    with pytest.raises(AssertionError):
        check(build.load(wrong, backend), SHAPE, device)
    tiled = replace(RUNG, defines={"TILE": 1})
    keys = {build.build_key(tiled, backend, "90a", d) for d in (None, {"TILE": 1}, {"TILE": 2})}
    assert len(keys) == 2
    assert len(builds(cache)) == 2


def test_one_build_is_as_many_kernels_as_are_asked_for(cache: Path) -> None:
    """A load answers what it was asked, whatever of the same text was loaded before."""
    rung = get_rung("k03")
    own = dict(rung.defines)
    picky = replace(rung, refusal=lambda shape, defines: "no")
    for _ in range(2):
        assert build.load(rung, "cpu", defines=own).defines == own
        assert build.load(rung, "cpu").defines == {}, "a timing would take it for a variant"
        with pytest.raises(ValueError, match="does not take this shape: no"):
            check(build.load(picky, "cpu"), SHAPE)
        check(build.load(rung, "cpu"), SHAPE)
    assert build.load(rung, "cpu") is build.load(rung, "cpu")
    assert len(builds(cache)) == 1
    build.forget(rung)
    assert {kernel.rung.refusal for kernel in build._loaded.values()} == {picky.refusal}


def test_the_key_holds_all_that_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc_version", lambda: "one")
    key = lambda arch="90a": build.build_key(RUNG, "cuda", arch, None)  # noqa: E731
    keys = [key(), key("80")]
    with monkeypatch.context() as m:
        m.setattr(torch, "__version__", "2.99")
        keys.append(key())
    with monkeypatch.context() as m:
        m.setattr(build, "CUDA_FLAGS", ("-O1",))
        keys.append(key())
    with monkeypatch.context() as m:
        m.setattr(build, "nvcc_version", lambda: "two")
        keys.append(key())
    assert len(set(keys)) == 5 and key() == keys[0]


def test_an_unknown_constant_is_refused() -> None:
    with pytest.raises(KeyError, match="TILE_X"):
        build.load(RUNG, "cpu", defines={"TILE_X": 3})


def test_a_compile_error_shows_the_compilers_lines(cache: Path) -> None:
    broken = replace(RUNG, source=RUNG.source.replace("float sum", "flaot sum", 1))
    with pytest.raises(build.CompileError, match=r"(?s)kernel\.cu.*flaot"):
        build.load(broken, "cpu")
    assert builds(cache) == []


@nvcc
def test_a_compile_error_of_nvcc_shows_its_lines() -> None:
    broken = replace(RUNG, source=RUNG.source.replace("float sum", "flaot sum", 1))
    with pytest.raises(build.CompileError, match=r"(?s)kernel\.cu.*flaot"):
        build.compile_report(broken)


def test_missing_tools_are_named_with_what_installs_them(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.MissingToolError, match=r"apt-get install g\+\+"):
        build.load(RUNG, "cpu")
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(build.MissingToolError, match="pip install ninja"):
        build.ninja_folder()
    build.cuda_home.cache_clear()
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(build, "_has_nvcc", lambda home: False)
    try:
        with pytest.raises(build.MissingToolError, match=r"pip install 'asymconv\[cuda\]'"):
            build.cuda_home()
    finally:
        build.cuda_home.cache_clear()


def test_cuda_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(build.BuildError, match="needs a GPU"):
        build.load(RUNG, "cuda")


def test_import_builds_nothing_and_is_quick(cache: Path) -> None:
    """Beyond torch itself, importing asymconv takes next to no time and makes no cache."""
    code = (
        "import time, torch; began = time.perf_counter(); import asymconv;"
        "print(time.perf_counter() - began)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.5
    assert not cache.exists()
