"""From a rung's CUDA text to a function that can be called, on a GPU or on a CPU.

`load` builds at first use and never at import. CUDA goes through
`torch.utils.cpp_extension.load_inline` (without torch's headers, which alone take half a minute),
the CPU through g++ and `asymconv.cpu`. Either way the result is a shared library in a cache
folder named by a hash over everything that went into it: text, flags, architecture, compiler,
torch. A changed one of these is another name, so a stale binary is never run.

A build happens in a folder of its own and is renamed into place when it is whole; who builds
holds an ``flock``, which the kernel drops when a process dies. So two processes may build at
once, and a killed build neither hangs nor breaks the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from asymconv import cpu
from asymconv.kernels.rung import ENTRY, ConvStruct, Rung
from asymconv.problem import ConvShape

Backend = Literal["cuda", "cpu", "cpu-traced"]

CUDA_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xptxas=-v")

# load_inline wants a Python module. An empty one keeps dlopen local: its other way,
# torch.ops.load_library, loads globally, and kernels of the same name would replace each other.
EMPTY_MODULE = r"""
#include <Python.h>
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, TEXT(TORCH_EXTENSION_NAME)};
PyMODINIT_FUNC JOIN(PyInit_, TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&definition); }
"""


class BuildError(RuntimeError):
    """A kernel could not be built. The message says what to install, or shows the compiler's."""


class MissingToolError(BuildError):
    """A program that builds need is not on this machine; the message has the command for it."""


class CompileError(BuildError):
    """The compiler refused the text; the message holds the compiler's own lines."""


class LaunchError(RuntimeError):
    """CUDA refused a launch; the message holds its error code and name."""


# --- the tools of this machine ---------------------------------------------------------------


def cxx_compiler() -> str:
    """The C++ compiler: ``$CXX`` or g++.

    Raises:
        MissingToolError: there is none.
    """
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise MissingToolError(
            f"no C++ compiler: {name!r} is not on PATH. "
            "Install one: apt-get install g++   (or: conda install -c conda-forge gxx)"
        )
    return name


def _has_nvcc(home: Path) -> bool:
    return (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists()


@functools.cache
def cuda_home() -> Path:
    """The CUDA toolkit's folder: the first with both bin/nvcc and include/cuda_runtime.h.

    Looks at ``$CUDA_HOME``, ``$CUDA_PATH``, where nvcc on PATH lies (a wrapper script there does
    not count: its folder has no headers), /usr/local/cuda, and pip's nvidia/cu13.

    Raises:
        MissingToolError: there is none.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if found := shutil.which("nvcc"):
        candidates.append(str(Path(found).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        candidates.append(str(Path(folder) / "cu13"))
    for candidate in filter(None, candidates):
        if _has_nvcc(home := Path(candidate)):
            return home
    raise MissingToolError(
        "no CUDA compiler: nvcc was not found. Install it: pip install 'asymconv[cuda]', "
        "or install the CUDA toolkit and set CUDA_HOME to its folder"
    )


@functools.cache
def _version_of(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip()


def nvcc_version() -> str:
    """The line of ``nvcc --version`` that names the build. Raises MissingToolError."""
    return _version_of(str(cuda_home() / "bin" / "nvcc")).splitlines()[-1]


def ninja_folder() -> Path:
    """The folder of the ninja program, on PATH or in the ninja package. Raises MissingToolError."""
    if found := shutil.which("ninja"):
        return Path(found).parent
    with contextlib.suppress(ImportError):
        import ninja

        return Path(ninja.BIN_DIR)
    raise MissingToolError("no ninja, which load_inline needs. Install it: pip install ninja")


def device_arch(rung: Rung, device: torch.device | int | None = None) -> str:
    """What to build for: "90a" if the rung insists on it, else the device's own, e.g. "80"."""
    major, minor = torch.cuda.get_device_capability(device)
    return rung.arch or f"{major}{minor}"


# --- the cache ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where builds are kept: ``$ASYMCONV_CACHE``, else asymconv under the user's cache folder."""
    if chosen := os.environ.get("ASYMCONV_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "asymconv"


def _digest(parts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on a file; it is dropped when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _built_folder(final: Path) -> Iterator[Path | None]:
    """Yield a folder to build in, or None if `final` is there; rename it when the block ends."""
    if final.exists():
        yield None
        return
    with _locked(final.with_name(final.name + ".lock")):
        if final.exists():  # another process was first
            yield None
            return
        work = Path(tempfile.mkdtemp(prefix=final.name + ".tmp-", dir=final.parent))
        try:
            yield work
            os.rename(work, final)
        finally:
            # This build's, if it failed, and those of killed ones: under the lock all others are.
            # At the end, since a killed build's compiler may still have been writing.
            for leftover in final.parent.glob(final.name + ".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)


def _run(command: Sequence[str], cwd: Path) -> str:
    """Run a compiler; its standard error. Raises CompileError with the lines it wrote."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip()
        raise CompileError(f"{Path(command[0]).name} failed ({done.returncode}):\n{lines}")
    return done.stderr


# --- CUDA ----------------------------------------------------------------------------------------

_load_inline_lock = threading.Lock()  # it changes PATH, and its own book-keeping is global


def _linkable_cudart(home: Path) -> list[str]:
    """Linker flags for a toolkit from pip, which ships libcudart.so.13 without libcudart.so."""
    for folder in (home / "lib64", home / "lib"):
        if (folder / "libcudart.so").exists():
            return [f"-L{folder}"]
        for library in sorted(folder.glob("libcudart.so.*")):
            links = cache_folder() / "lib"
            links.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                (links / "libcudart.so").symlink_to(library)
            return [f"-L{links}"]
    return []


def _build_cuda(text: str, name: str, arch: str, folder: Path) -> None:
    """Put kernel.so for a CUDA text into a folder. Raises BuildError."""
    home, ninja = cuda_home(), ninja_folder()
    cxx_compiler()
    with _load_inline_lock:
        from torch.utils import cpp_extension  # slow to import, and not needed before

        path, cpp_extension.CUDA_HOME = os.environ["PATH"], str(home)
        os.environ["PATH"] = f"{ninja}{os.pathsep}{path}"
        try:
            module = cpp_extension.load_inline(
                name=name,
                cpp_sources=EMPTY_MODULE,
                cuda_sources=text,
                extra_cuda_cflags=[*CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"],
                # kernels of the same name in several libraries: each calls its own
                extra_ldflags=["-Wl,-Bsymbolic", *_linkable_cudart(home)],
                build_directory=str(folder),
                no_implicit_headers=True,
            )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            lines = str(error)
            raise CompileError(f"nvcc failed for {name}:\n{lines}") from error
        finally:
            os.environ["PATH"] = path
    os.rename(module.__file__, folder / "kernel.so")


# --- what comes out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelReport:
    """What ptxas says of one __global__ function: registers a thread, bytes of each memory."""

    function: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class CompileReport:
    """One rung compiled for one architecture by nvcc, without a GPU."""

    rung: str
    arch: str
    kernels: tuple[KernelReport, ...]
    warnings: tuple[str, ...]


def _parse_ptxas(lines: str) -> tuple[KernelReport, ...]:
    kernels = []
    for part in lines.split("Compiling entry function '")[1:]:

        def number(pattern: str, part: str = part) -> int:
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        kernels.append(
            KernelReport(
                function=part.split("'", 1)[0],
                registers=number(r"Used (\d+) registers"),
                stack=number(r"(\d+) bytes stack frame"),
                spill_stores=number(r"(\d+) bytes spill stores"),
                spill_loads=number(r"(\d+) bytes spill loads"),
                shared=number(r"(\d+) bytes smem"),
            )
        )
    return tuple(kernels)


def compile_report(
    rung: Rung, arch: str | None = None, defines: Mapping[str, int] | None = None
) -> CompileReport:
    """Compile a rung for an architecture (its own, or "90", unless told) and read ptxas's report.

    Needs nvcc, no GPU. Raises BuildError.
    """
    arch = arch or rung.arch or "90"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cu").write_text(rung.text(defines))
        command = [str(cuda_home() / "bin" / "nvcc"), *CUDA_FLAGS, "-cubin", "kernel.cu"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-ccbin", cxx_compiler()]
        lines = _run(command, Path(folder))
    # (C75..): ptxas serializes wgmma, and calls that information
    telling = ("warning", "(c75")
    warnings = tuple(li for li in lines.splitlines() if any(t in li.lower() for t in telling))
    return CompileReport(rung.name, arch, _parse_ptxas(lines), warnings)


class Prepared(NamedTuple):
    """What every launch of a shape needs, worked out once.

    Attributes:
        shape: the convolution.
        sizes: of x, weight, bias and out.
        struct: its sizes as the CUDA text reads them.
        address: of the struct, which lives as long as this does.
    """

    shape: ConvShape
    sizes: tuple[tuple[int, ...], ...]
    struct: ConvStruct
    address: int

    @classmethod
    def of(cls, shape: ConvShape) -> Prepared:
        """For a shape."""
        struct = ConvStruct.of(shape)
        sizes = (shape.input_shape, shape.weight_shape, (shape.out_channels,), shape.output_shape)
        return cls(shape, sizes, struct, ctypes.addressof(struct))


class Kernel:
    """A rung, built: call it with tensors.

    Attributes:
        rung, backend, defines: what was built, for which, with which constants, as `load` was told
            them: the rung's own values may be among them.
        key: the cache's name for this very build; a check and a timing both carry it.
        path: the shared library.
    """

    def __init__(
        self,
        rung: Rung,
        backend: Backend,
        key: str,
        path: Path,
        defines: Mapping[str, int] | None = None,
    ) -> None:
        self.rung, self.backend, self.key, self.path = rung, backend, key, path
        self.precision, self.mixes_rows = rung.precision, rung.mixes_rows
        self.defines = dict(defines or {})
        self._prepared = functools.lru_cache(maxsize=1024)(self._prepare)
        if backend == "cuda":
            self._entry = getattr(ctypes.CDLL(str(path)), ENTRY)
            self._entry.argtypes = [ctypes.c_void_p] * 6
            self._entry.restype = ctypes.c_int
        else:
            self.program = cpu.Program(path)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: ConvShape,
        out: torch.Tensor | None = None,
        *,
        order_seed: int = 0,
        trace: bool = False,
        racecheck: bool = False,
        multiprocessors: int = cpu.MULTIPROCESSORS,
    ) -> torch.Tensor:
        """Convolve; on CUDA, queue it on the current stream.

        Args:
            x: (N, C, H, W) float32, contiguous, on the backend's kind of device.
            weight: (K, C / groups, R, S), likewise.
            bias: (K,) likewise, or None.
            shape: the convolution; must agree with the tensors.
            out: (N, K, OH, OW), written whole; a new tensor if None.
            order_seed: CPU only: not 0 runs a block's threads in another order.
            trace, racecheck: "cpu-traced" only: count memory accesses; find shared-memory races.
            multiprocessors: CPU only: of the GPU that it stands for.

        Raises:
            ValueError: tensors that do not fit the shape, or a shape that the rung refuses.
            LaunchError: CUDA's own refusal.
            asymconv.cpu.EmulationError: the CPU run found a fault in the kernel.
        """
        prepared = self._prepared(shape)
        if out is None:
            out = torch.empty(prepared.sizes[-1], dtype=torch.float32, device=x.device)
        self._check_tensors((x, weight, bias, out), prepared.sizes)
        if out.numel() > 0:
            how = dict(order_seed=order_seed, trace=trace, racecheck=racecheck)
            self.launch(x, weight, bias, out, prepared, multiprocessors=multiprocessors, **how)
        return out

    def run(
        self,
        prepared: Prepared,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """What a call does, without its checks: for tensors that `asymconv.dispatch` has looked at.

        Args:
            prepared: of a shape which the rung takes, and which has outputs.
            x, weight, bias: of that shape, float32, contiguous, on one device, of this kernel's
                kind.

        Returns:
            (N, K, OH, OW), new.

        Raises:
            LaunchError: CUDA's own refusal.
            asymconv.cpu.EmulationError: the CPU run found a fault in the kernel.
        """
        out = x.new_empty(prepared.sizes[-1])
        self.launch(x, weight, bias, out, prepared)
        return out

    def launch(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        prepared: Prepared,
        **emulation: int,
    ) -> None:
        """Queue the kernel: all calls end here. Nothing is checked.

        Args:
            x, weight, bias, prepared: as `run` has them.
            out: (N, K, OH, OW), likewise, starting at a multiple of 16 bytes.
            emulation: CPU only: `asymconv.cpu.Program.call`'s options.

        Raises:
            LaunchError: CUDA's own refusal.
            asymconv.cpu.EmulationError: the CPU run found a fault in the kernel.
        """
        if self.backend != "cuda":
            code = self._emulate(x, weight, bias, out, prepared, emulation)
        else:
            index = x.get_device()
            arguments = (
                x.data_ptr(),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                out.data_ptr(),
                prepared.address,
                # torch.cuda.current_stream() makes an object, which takes longer than all the rest
                # here; TorchInductor asks for its launches' stream as this does
                torch._C._cuda_getCurrentRawStream(index),
            )
            if index == torch.cuda.current_device():
                code = self._entry(*arguments)
            else:
                with torch.cuda.device(index):
                    code = self._entry(*arguments)
        if code:
            where = f"{self.rung.name}: launch failed"
            raise LaunchError(f"{where} with cudaError {code} for {prepared.shape}")

    def _emulate(self, x, weight, bias, out, prepared: Prepared, options: Mapping[str, int]) -> int:
        """On this CPU; returns a cudaError."""
        tensors = {"x": x, "w": weight, "bias": bias, "y": out}
        return self.program.call(
            ENTRY,
            *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors.values()),
            ctypes.byref(prepared.struct),
            ctypes.c_void_p(None),
            buffers=[
                cpu.Buffer(name, t.data_ptr(), t.numel() * t.element_size())
                for name, t in tensors.items()
                if t is not None
            ],
            **options,
        )

    def trace(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: ConvShape,
        multiprocessors: int = cpu.MULTIPROCESSORS,
    ) -> list[cpu.LineCount]:
        """The memory accesses of one call, line by line of the rung's own source.

        Backend "cpu-traced" only. The tensors are copied to where cudaMalloc would put them, at
        multiples of 256 bytes, so that the sectors counted are those of a GPU.

        Args:
            x, weight, bias, shape: as of a call (`__call__`): (N, C, H, W) and so on.
            multiprocessors: of the GPU, for rungs that start as many blocks as it has.

        Raises what a call raises.
        """
        data = [
            None if t is None else cpu.aligned_empty(*t.shape).copy_(t) for t in (x, weight, bias)
        ]
        out = cpu.aligned_empty(*shape.output_shape)
        self(*data, shape, out, trace=True, multiprocessors=multiprocessors)
        return self.program.counts()

    def _prepare(self, shape: ConvShape) -> Prepared:
        if reason := self.rung.refuses(shape, self.defines):
            raise ValueError(f"{self.rung.name} does not take this shape: {reason}")
        return Prepared.of(shape)

    def _check_tensors(
        self, tensors: Sequence[torch.Tensor | None], sizes: Sequence[tuple[int, ...]]
    ) -> None:
        kind = "cuda" if self.backend == "cuda" else "cpu"
        device = tensors[0].device
        for name, tensor, size in zip(("x", "weight", "bias", "out"), tensors, sizes, strict=True):
            if tensor is None:
                continue
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous float32, is {tensor.dtype}")
            if tensor.device.type != kind or tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, must be with x on {kind}")
            if name == "out" and tensor.data_ptr() % 16:  # rungs store float2 and float4
                raise ValueError("out must start at a multiple of 16 bytes")
            if tensor.shape != size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {size}")


_loaded: dict[tuple[object, ...], Kernel] = {}


def build_key(rung: Rung, backend: Backend, arch: str, defines: Mapping[str, int] | None) -> str:
    """The cache's name for a build: the rung's number, the backend and a hash of what goes in."""
    parts: dict[str, object] = {"text": rung.text(defines), "backend": backend}
    if backend == "cuda":
        parts |= {
            "arch": arch,
            "flags": CUDA_FLAGS,
            "nvcc": nvcc_version(),
            "cxx": _version_of(cxx_compiler()),
            "module": EMPTY_MODULE,
            "torch": torch.__version__,
            "python": sys.version,
        }
    else:
        parts |= {"cpu": cpu.fingerprint(cxx_compiler()), "cxx": cxx_compiler()}
    return f"{rung.number}-{backend}{arch and '-sm_' + arch}-{_digest(parts)}"


def load(
    rung: Rung,
    backend: Backend,
    *,
    defines: Mapping[str, int] | None = None,
    device: torch.device | int | None = None,
) -> Kernel:
    """The rung's kernel, built if the cache has it not.

    Args:
        rung: which.
        backend: "cuda", "cpu", or "cpu-traced" (slower, counts its memory accesses).
        defines: tile constants that differ from the rung's own.
        device: the CUDA device to build for; the current one if None.

    Raises:
        MissingToolError: no compiler; says what to install.
        CompileError: the compiler's own lines.
        BuildError: the rung cannot run on this backend or device; says why.
    """
    arch = ""
    if backend == "cuda":
        if not torch.cuda.is_available():
            raise BuildError("backend 'cuda' needs a GPU and a CUDA build of torch")
        capability = torch.cuda.get_device_capability(device)
        if not rung.runs_on(capability):
            raise BuildError(
                f"{rung.name} needs sm_{rung.arch or rung.capability}, not {capability}"
            )
        arch = device_arch(rung, device)
    key = build_key(rung, backend, arch, defines)
    # one build may be several kernels: no constants, or those the rung has, make the same text, and
    # so does a rung that refuses other shapes; its id stays its own, as its kernel holds it
    asked = (key, id(rung), *sorted((defines or {}).items()))
    if asked in _loaded:
        return _loaded[asked]
    final = cache_folder() / key
    with _built_folder(final) as folder:
        if folder is not None:
            if backend == "cuda":
                name = re.sub(r"\W", "_", f"asymconv_{key}")
                _build_cuda(rung.text(defines), name, arch, folder)
            else:
                _build_cpu(rung.text(defines), backend == "cpu-traced", folder)
    return _loaded.setdefault(asked, Kernel(rung, backend, key, final / "kernel.so", defines))


def _build_cpu(text: str, traced: bool, folder: Path) -> None:
    """Compile a CUDA text for this CPU; what all texts are linked with is compiled once."""
    cxx = cxx_compiler()
    parts = {"cpu": cpu.fingerprint(cxx), "cxx": cxx, "traced": traced}
    runtime = cache_folder() / f"emulator-{_digest(parts)}"
    with _built_folder(runtime) as empty:
        if empty is not None:
            _run(cpu.runtime_command(empty, traced=traced, cxx=cxx), empty)
    cpu.write_sources(text, folder)
    for command in cpu.commands(folder, runtime, traced=traced, cxx=cxx):
        _run(command, folder)


def forget(rung: Rung) -> None:
    """Drop this process's loaded kernels of a rung, so that the next `load` goes to the cache."""
    for asked in [asked for asked, kernel in _loaded.items() if kernel.rung is rung]:
        del _loaded[asked]


def _build_only(rung: Rung, defines: Mapping[str, int]) -> None:
    load(rung, "cuda", defines=defines)


def load_all(jobs: Sequence[tuple[Rung, Mapping[str, int]]]) -> list[Kernel]:
    """CUDA kernels for rungs with their defines, built by as many processes as there are cores.

    Raises what `load` raises.
    """
    keys = [build_key(rung, "cuda", device_arch(rung), defines) for rung, defines in jobs]
    todo = [job for job, key in zip(jobs, keys, strict=True) if not (cache_folder() / key).exists()]
    if len(todo) > 1:  # else other processes would not be worth their start
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        with ProcessPoolExecutor(min(len(todo), os.cpu_count() or 1), mp_context=context) as pool:
            for done in [pool.submit(_build_only, rung, defines) for rung, defines in todo]:
                done.result()
    return [load(rung, "cuda", defines=defines) for rung, defines in jobs]
