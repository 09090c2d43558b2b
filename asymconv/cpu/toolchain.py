"""From a CUDA text to a shared library: the sources, the flags, the g++ commands.

Why these flags:

- Plain: ``-O3``, and on x86-64 machines that have it the AVX2 and FMA level of instructions.
  ``-ffp-contract=off`` keeps the results the same on every machine (nvcc fuses ``a * b + c`` by
  default: write ``fmaf`` where a result must agree to the bit). ``-fno-strict-aliasing``: CUDA
  texts view floats as float4 and halves as words.
- Traced: ``-O0 -fsanitize=thread``. Not because it is easy to read: at -O0 a load or store in the
  source is one access in the machine code, whatever the version of g++. With optimization, g++ 11
  and 12 hoist, join and drop different ones, flag by flag. Local variables and arrays whose address
  is not passed on are not instrumented, so they cost no calls. ``-fsanitize-coverage=trace-pc``
  tells the way of each lane through branches and loops.
- The emulator's own sources are always built with the plain flags: they hold the matrix products.
- Both: ``-fno-gnu-unique``, else two libraries would share the static variables of templates;
  ``-fstack-clash-protection``, so that a frame larger than a fiber's stack meets its guard page;
  ``-g1`` or ``-g`` for the lines.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from pathlib import Path

from asymconv.cpu.translate import translate

_HERE = Path(__file__).parent
KERNEL = "kernel.cu"
"""What compiler errors and memory counts call the CUDA text."""

_HEADERS = ("emu.h", "emu_half.h", "emu_hopper.h", "emu_ptx.h", "emu_runtime.h")
_RUNTIME = ("emu_runtime.cpp", "emu_ptx.cpp", "emu_hopper.cpp")
_TRACER = ("emu_trace.cpp",)
_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-fno-threadsafe-statics",
    "-fno-exceptions",
    "-fstack-clash-protection",
    "-ffp-contract=off",
)
_PLAIN = ("-O3", "-g1", "-fno-semantic-interposition")
_TRACED = ("-O0", "-g", "-fsanitize=thread", "-fsanitize-coverage=trace-pc")
_LINK = ("-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs")
_X86_64_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}


def fingerprint(cxx: str = "g++") -> str:
    """32 hex digits that change whenever a build of the same text could come out otherwise.

    They cover this package's sources, the flags for this machine, and the compiler's version.

    Raises:
        OSError: there is no such compiler.
    """
    digest = hashlib.sha256()
    for path in sorted(_HERE.iterdir()):
        if path.suffix in {".py", ".h", ".cpp"}:
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(repr((_plain_flags(), platform.machine())).encode())
    digest.update(_version(cxx).encode())
    return digest.hexdigest()[:32]


def runtime_command(folder: Path, *, traced: bool, cxx: str = "g++") -> list[str]:
    """The command, to be run in `folder`, that compiles there what all kernels are linked with.

    Args:
        folder: an existing one.
        traced: what libraries that count and check memory accesses need.
        cxx: the compiler.
    """
    sources = [str(_HERE / name) for name in _runtime(traced)]
    return [cxx, *_COMMON, *_plain_flags(), f"-DEMU_TRACED={int(traced)}", "-c", *sources]


def write_sources(source: str, folder: Path) -> None:
    """Write all that `commands` compiles into an existing folder.

    Args:
        source: the CUDA text; also written, as kernel.cu, to look at.
        folder: gets kernel.cpp and the headers that it includes.

    Raises:
        TranslationError: the text has a launch that the translator cannot read.
    """
    (folder / KERNEL).write_text(source)
    (folder / "kernel.cpp").write_text(translate(source, KERNEL))
    for name in _HEADERS:
        (folder / name).write_bytes((_HERE / name).read_bytes())


def commands(
    folder: Path, runtime: Path, *, traced: bool, cxx: str = "g++"
) -> tuple[list[str], list[str]]:
    """The commands, compiler and linker, that turn the sources into folder/"kernel.so".

    Args:
        folder: where `write_sources` wrote.
        runtime: where `runtime_command` of the same compiler, `traced` alike, has run.
        traced: build the library that counts and checks memory accesses; it is slower.
        cxx: the compiler. Traced builds want g++ (clang splits vector copies into calls of memcpy).
    """
    kernel_flags = _TRACED if traced else _plain_flags()
    kernel_object = str(folder / "kernel.o")
    objects = [str(runtime / name.replace(".cpp", ".o")) for name in _runtime(traced)]
    return (
        [cxx, *_COMMON, *kernel_flags, "-c", str(folder / "kernel.cpp"), "-o", kernel_object],
        [cxx, *objects, kernel_object, *_LINK, "-o", str(folder / "kernel.so")],
    )


def _runtime(traced: bool) -> tuple[str, ...]:
    return (*_RUNTIME, *_TRACER) if traced else _RUNTIME


def _plain_flags() -> tuple[str, ...]:
    return (*_PLAIN, "-march=x86-64-v3") if _has_x86_64_v3() else _PLAIN


@functools.cache
def _has_x86_64_v3() -> bool:
    if platform.machine() not in {"x86_64", "AMD64"}:
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(flags.split()) >= _X86_64_V3


@functools.cache
def _version(cxx: str) -> str:
    done = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False)
    return done.stdout
