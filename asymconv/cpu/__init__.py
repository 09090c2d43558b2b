"""Runs CUDA C++ on a CPU, and counts what its memory accesses would cost a GPU.

The same text that nvcc compiles is translated as little as g++ needs (`translate`), compiled to a
shared library (`runtime_command`, `write_sources`, `commands`) and run (`Program`): one block or
cluster at a time, every CUDA thread on a stack of its own, with barriers, warp shuffles, shared
memory, cp.async, ldmatrix and mma.sync; and of Hopper mbarriers, named barriers, wgmma and bulk
copies. Tensor maps and clusters of more than two blocks are not there.

- Shared memory holds NaN when a block begins. A barrier that not all threads reach, and every other
  fault, is an `EmulationError` that names kernel and block; the process and the library live on.
- What is asynchronous happens as late as the program allows, so that a missing wait shows.
- A traced library also finds accesses out of bounds, races in shared memory and missing fences
  before asynchronous reads of it, and counts, line by line, requests, sectors and wavefronts as a
  profiler would (`Program.counts`; shared memory as wgmma and bulk copies read it is not counted).
"""

from asymconv.cpu.program import (
    MULTIPROCESSORS,
    Buffer,
    EmulationError,
    LineCount,
    Program,
    Request,
    aligned_empty,
)
from asymconv.cpu.toolchain import commands, fingerprint, runtime_command, write_sources
from asymconv.cpu.translate import TranslationError, translate

__all__ = [
    "MULTIPROCESSORS",
    "Buffer",
    "EmulationError",
    "LineCount",
    "Program",
    "Request",
    "TranslationError",
    "aligned_empty",
    "commands",
    "fingerprint",
    "runtime_command",
    "translate",
    "write_sources",
]
