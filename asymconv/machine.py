"""What this machine can do, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from asymconv import build


@dataclass(frozen=True)
class Part:
    """One thing the study can use.

    Attributes:
        what: its name.
        there: whether this machine has it.
        found: what was found, or "missing".
        mend: what goes without it, and the command that installs it.
    """

    what: str
    there: bool
    found: str
    mend: str


def _tool(what: str, look: Callable[[], str], mend: str) -> Part:
    try:
        return Part(what, True, look(), mend)
    except build.MissingToolError as error:
        return Part(what, False, "missing", f"{mend}: {error}")


def _program(what: str, name: str, mend: str) -> Part:
    found = shutil.which(name)
    return Part(what, found is not None, found or "missing", mend)


def _package(name: str, mend: str) -> Part:
    found = importlib.util.find_spec(name) is not None
    return Part(name, found, "installed" if found else "missing", mend)


def _gpu() -> Part:
    mend = "figures come from the records, kernels run on the CPU"
    if not torch.version.cuda:
        mend += "; this is a CPU build of torch: install a CUDA build to use a GPU"
    if not torch.cuda.is_available():
        return Part("GPU", False, "none", mend)
    major, minor = torch.cuda.get_device_capability()
    return Part("GPU", True, f"{torch.cuda.get_device_name()}, sm_{major}{minor}", mend)


def survey() -> list[Part]:
    """Everything the study can use, in the order in which it matters."""
    return [
        Part("Python", True, platform.python_version(), ""),
        Part("torch", True, f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})", ""),
        _gpu(),
        _tool("g++", build.cxx_compiler, "no kernel runs on the CPU"),
        _tool("nvcc", lambda: f"{build.cuda_home()}, {build.nvcc_version()}", "no CUDA build"),
        _tool("ninja", lambda: str(build.ninja_folder()), "no CUDA build"),
        _package("papermill", "no `asymconv study`: pip install 'asymconv[study]'"),
        _package("nbval", "no tests of the notebooks: pip install 'asymconv[test]'"),
        _program("ncu", "ncu", "no hardware counters; it comes with the CUDA toolkit"),
        Part("cache", True, str(build.cache_folder()), ""),
    ]


def summary() -> str:
    """In a sentence or two: what runs here."""
    there = {part.what: part.there for part in survey()}
    if there["GPU"] and there["nvcc"]:
        return "Kernels are built and measured on this GPU: asymconv bench, asymconv study."
    cpu = "run on the CPU" if there["g++"] else "cannot run (no g++)"
    compiled = ", and are compiled for sm_90a by nvcc" if there["nvcc"] else ""
    return (
        f"No GPU to measure on: the kernels' CUDA texts {cpu}{compiled}; "
        "timings are shown from the records."
    )
