"""A compiled CUDA text: call its launchers, and read what its memory accesses were."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Space = Literal["global", "shared"]
Op = Literal["load", "store", "atomic"]

MAX_KEPT_REQUESTS = 32
"""How many requests of an instruction a traced call keeps (emu_trace.cpp: kKeptRequests)."""

_OPS: tuple[Op, ...] = ("load", "store", "atomic")
_WARP = 32
_SHARED_NAMES = {-1: "dynamic shared", -2: "static shared"}
_CUDA_MALLOC_ALIGNMENT = 256  # bytes

# One call at a time in a process: calls change how the process handles faults while they run.
MULTIPROCESSORS = 4
"""Of the device that CUDA text sees unless told: a grid that fills them stays small."""

_CALLS = threading.Lock()


class EmulationError(RuntimeError):
    """A kernel did what CUDA forbids; the message names kernel, block and reason."""


@dataclass(frozen=True)
class Buffer:
    """A piece of "global memory" that a kernel may access.

    Attributes:
        name: what errors and requests call it.
        address: of its first byte.
        nbytes: its size.
    """

    name: str
    address: int
    nbytes: int


@dataclass(frozen=True)
class LineCount:
    """What one source line did to memory, all threads of a traced call together.

    A request is one instruction of one warp. Counts are of the source as written: nvcc may join,
    hoist or drop accesses.

    Attributes:
        line: of the CUDA text, from 1.
        space: "global" or "shared".
        op: "load", "store" or "atomic".
        bytes_per_lane: the width of the access, 1 to 16.
        requests: how many were issued.
        sectors: 32-byte pieces of global memory that requests touched; 0 for shared memory.
        wavefronts: rounds in which shared memory served them; 0 for global memory.
        ideal_wavefronts: the same without bank conflicts: the different words of a warp, or of
            each half of it for accesses wider than 4 bytes, over 32 banks.
        lanes: threads that took part, over all requests; 32 a request at best.
    """

    line: int
    space: Space
    op: Op
    bytes_per_lane: int
    requests: int
    sectors: int
    wavefronts: int
    ideal_wavefronts: int
    lanes: int

    @property
    def lanes_per_request(self) -> float:
        """Threads that took part in a request, 32 at best."""
        return self.lanes / self.requests

    @property
    def sectors_per_request(self) -> float:
        """Sectors of 32 bytes that a request touched."""
        return self.sectors / self.requests

    @property
    def wavefronts_per_request(self) -> float:
        """Rounds in which shared memory served a request."""
        return self.wavefronts / self.requests


@dataclass(frozen=True)
class Request:
    """One instruction of one warp, and the addresses of its lanes.

    Attributes:
        line, space, op, bytes_per_lane: as in LineCount.
        block: blockIdx (x, y, z).
        warp: number of the warp in its block.
        lanes: 32 entries: None for a lane that took no part, else the name of the buffer and the
            offset into it in bytes. Shared memory goes by "dynamic shared" and "static shared";
            offset // 4 % 32 is the bank.
    """

    line: int
    space: Space
    op: Op
    bytes_per_lane: int
    block: tuple[int, int, int]
    warp: int
    lanes: tuple[tuple[str, int] | None, ...]


class _Site(ctypes.Structure):
    _fields_ = [
        ("pc", ctypes.c_uint64),
        ("wrapped", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("op", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("requests", ctypes.c_int64),
        ("lanes", ctypes.c_int64),
        ("sectors", ctypes.c_int64),
        ("wavefronts", ctypes.c_int64),
        ("ideal_wavefronts", ctypes.c_int64),
        ("kept", ctypes.c_int32),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("block", ctypes.c_uint32 * 3),
        ("lanes", ctypes.c_uint32),
        ("warp", ctypes.c_int32),
        ("where", ctypes.c_int32 * _WARP),
        ("offset", ctypes.c_int64 * _WARP),
    ]


class Program:
    """A shared library that `commands` made.

    Attributes:
        path: the library.
        traced: whether it can count and check memory accesses.
    """

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            OSError: it is not there, or cannot be loaded.
        """
        self.path = Path(path)
        self._library = ctypes.CDLL(str(path))  # RTLD_LOCAL: several programs do not mix
        self._library.emu_end.restype = ctypes.c_char_p
        self.traced = hasattr(self._library, "emu_watch")
        self._lines: dict[tuple[int, bool], int] = {}  # (pc, wrapped) -> source line
        self._sites: list[_Site] = []
        self._requests: list[list[_Request]] = []  # of each site
        self._buffer_names: list[str] = []

    def call(
        self,
        symbol: str,
        *args: Any,
        buffers: Sequence[Buffer] = (),
        order_seed: int = 0,
        trace: bool = False,
        racecheck: bool = False,
        multiprocessors: int = MULTIPROCESSORS,
    ) -> int:
        """Call an ``extern "C" int`` function of the text, which launches kernels.

        Calls are made one at a time, whatever the Python thread.

        Args:
            symbol: the function's name.
            args: ctypes values.
            buffers: the global memory that kernels may access; checked in traced calls.
            order_seed: not 0: the threads of a block run in an order drawn from it.
            trace: count memory accesses and check their bounds; needs a traced library.
            racecheck: look for races in shared memory and check bounds; needs a traced library.
            multiprocessors: of the device that the text sees.

        Returns:
            What the function returns: by convention the launch's cudaError_t.

        Raises:
            EmulationError: a kernel did what CUDA forbids. The next call starts afresh.
            AttributeError: the library has no such function.
            TypeError: an argument that is no ctypes value (ctypes would cut pointers to 32 bits).
            ValueError: trace or racecheck on a library that was not built for it.
        """
        if (trace or racecheck) and not self.traced:
            raise ValueError(f"{self.path} was not built with traced=True")
        for arg in args:
            if isinstance(arg, (int, float, str)) or arg is None:
                raise TypeError(f"arguments must be ctypes values, not {arg!r}")
        function = getattr(self._library, symbol)
        function.restype = ctypes.c_int
        with _CALLS:
            self._library.emu_begin(ctypes.c_int(order_seed), ctypes.c_int(multiprocessors))
            try:
                if self.traced:
                    self._watch(buffers, trace, racecheck)
                result = function(*args)
            finally:
                error = self._library.emu_end()
            if trace:
                self._read_trace()
        if error is not None:
            raise EmulationError(self._readable(error.decode()))
        return result

    def counts(self) -> list[LineCount]:
        """The memory accesses of the last traced call, sorted by line, then space, op and width.

        Raises:
            OSError: addr2line (of binutils, which g++ needs too) is not there.
        """
        self._find_lines((s.pc, bool(s.wrapped)) for s in self._sites)
        sums: dict[tuple[int, Space, Op, int], list[int]] = {}
        for site in self._sites:
            values = (site.requests, site.sectors, site.wavefronts)
            values += (site.ideal_wavefronts, site.lanes)
            total = sums.setdefault(self._key(site), [0] * len(values))
            total[:] = [a + b for a, b in zip(total, values, strict=True)]
        return [LineCount(*key, *total) for key, total in sorted(sums.items()) if total[0]]

    def requests(self, line: int | None = None, limit: int = 1) -> list[Request]:
        """The first requests of every load and store of the last traced call, sorted by line.

        Args:
            line: of the CUDA text; None: all lines.
            limit: how many of each instruction, at most MAX_KEPT_REQUESTS.

        Raises:
            ValueError: limit is out of range.
        """
        if not 0 < limit <= MAX_KEPT_REQUESTS:
            raise ValueError(f"limit must be 1 to {MAX_KEPT_REQUESTS}, not {limit}")
        self._find_lines((s.pc, bool(s.wrapped)) for s in self._sites)
        found = [
            self._request(site, kept)
            for site, all_kept in zip(self._sites, self._requests, strict=True)
            if line is None or line == self._key(site)[0]
            for kept in all_kept[:limit]
        ]
        return sorted(found, key=lambda r: (r.line, r.space, r.op, r.bytes_per_lane))

    def _watch(self, buffers: Sequence[Buffer], trace: bool, racecheck: bool) -> None:
        n = len(buffers)
        self._buffer_names = [b.name for b in buffers]
        self._library.emu_watch(
            ctypes.c_int(trace),
            ctypes.c_int(racecheck),
            ctypes.c_int(n),
            (ctypes.c_uint64 * n)(*(b.address for b in buffers)),
            (ctypes.c_size_t * n)(*(b.nbytes for b in buffers)),
        )

    def _read_trace(self) -> None:
        """Take over what the library has counted; the next call forgets it."""
        self._sites, self._requests = [], []
        for i in range(self._library.emu_site_count()):
            site = _Site()
            self._library.emu_site(ctypes.c_int(i), ctypes.byref(site))
            kept = [_Request() for _ in range(site.kept)]
            for k, request in enumerate(kept):
                self._library.emu_request(ctypes.c_int(i), ctypes.c_int(k), ctypes.byref(request))
            self._sites.append(site)
            self._requests.append(kept)

    def _key(self, site: _Site) -> tuple[int, Space, Op, int]:
        line = self._lines[site.pc, bool(site.wrapped)]
        return line, "shared" if site.shared else "global", _OPS[site.op], site.bytes

    def _request(self, site: _Site, kept: _Request) -> Request:
        lanes = tuple(
            (self._place_name(kept.where[lane]), kept.offset[lane])
            if kept.lanes >> lane & 1
            else None
            for lane in range(_WARP)
        )
        return Request(*self._key(site), tuple(kept.block), kept.warp, lanes)

    def _place_name(self, where: int) -> str:
        return _SHARED_NAMES[where] if where < 0 else self._buffer_names[where]

    def _readable(self, message: str) -> str:
        """An error of the library with lines for code addresses, names for buffers."""
        places = re.compile(r"\{pc:([0-9a-f]+):([01])\}")
        pcs = [(int(m[1], 16), m[2] == "1") for m in places.finditer(message)]
        self._find_lines(pcs)
        lines: Mapping[tuple[int, bool], int] = self._lines
        message = places.sub(lambda m: str(lines[int(m[1], 16), m[2] == "1"]), message)
        return re.sub(r"\{buffer:(\d+)\}", lambda m: self._buffer_names[int(m[1])], message)

    def _find_lines(self, pcs: Iterable[tuple[int, bool]]) -> None:
        """Look up the source lines of code addresses with addr2line; remembers them."""
        missing = sorted({pc for pc in pcs if pc not in self._lines})
        if not missing:
            return
        # a hook's return address is the instruction after its call
        addresses = [hex(pc - 1) for pc, _ in missing]
        command = ["addr2line", "--exe", str(self.path), "--inlines", "--addresses", *addresses]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        chains = re.split(r"^0x[0-9a-f]+\n", done.stdout, flags=re.MULTILINE)[1:]
        for (pc, wrapped), chain in zip(missing, chains, strict=True):
            self._lines[pc, wrapped] = _source_line(chain.splitlines(), wrapped)


def _source_line(frames: Sequence[str], wrapped: bool) -> int:
    """The line to book an access on; 0 if unknown.

    Args:
        frames: "file:line" of the code address, then of what it was inlined into, and so on.
        wrapped: the access was made by a twin of a PTX instruction: the text's innermost function
            is the wrapper, and the line is its caller's.
    """
    lines = []
    for frame in frames:
        file, _, line = frame.split(" (")[0].rpartition(":")
        if not re.match(r"emu\w*\.h$", Path(file).name) and line.isdigit():
            lines.append(int(line))
    if wrapped and len(lines) > 1:
        return lines[1]
    return lines[0] if lines else 0


def aligned_empty(*shape: int) -> torch.Tensor:
    """An uninitialized float32 CPU tensor of this shape that begins, as cudaMalloc's, at 256 bytes.

    The sectors of a request depend on where its tensor begins; torch aligns to 64 bytes only.
    """
    import torch

    numel = 1
    for extent in shape:
        numel *= extent
    spare = _CUDA_MALLOC_ALIGNMENT // 4
    storage = torch.empty(numel + spare, dtype=torch.float32)
    skip = -storage.data_ptr() % _CUDA_MALLOC_ALIGNMENT // 4
    return storage[skip : skip + numel].view(shape)
