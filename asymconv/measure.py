"""Timings on a GPU: methods side by side in one run, and the ceilings they are held against.

CUDA events around each call, warm-up before, every repeat kept. The methods take turns in rounds,
so that a drift of the clock meets all of them. A turn's calls are queued behind each other: the
GPU never waits for its host between an event and what it times. Data smaller than a few L2 caches
are flushed out of it before each repeat, for longer than the host needs to launch it. There is no
timing without an `asymconv.check.Checked` of that very build and shape.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from asymconv import build
from asymconv.check import Checked, Expected, Method, check, random_data
from asymconv.kernels import RUNGS, Precision, Rung
from asymconv.problem import ConvShape

Kind = Literal["rung", "peer", "ceiling"]

WARM_MS = 50.0  # of a method, before each of its turns
# A host stumbles: before a call the GPU is busy for so many times what its host needs, or for ms.
HOST_MARGIN, HOST_LEAST_MS = 5.0, 1.0
LONG_MS = 50.0  # beside that the host's time for a launch is nothing
L2_MULTIPLE = 4  # inputs beyond this many L2 caches leave nothing of themselves behind


@contextlib.contextmanager
def convolution_flags(precision: Precision, benchmark: bool = False) -> Iterator[None]:
    """PyTorch's settings for float32 convolutions, put back afterwards."""
    cudnn = torch.backends.cudnn
    before = (cudnn.conv.fp32_precision, cudnn.benchmark)
    cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    cudnn.benchmark = benchmark
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.benchmark = before


Call = Callable[[], torch.Tensor]
"""A convolution with everything it needs at hand: what is timed."""


def _conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape
) -> Call:
    return lambda: F.conv2d(x, weight, bias, **shape.conv_args())


def _channels_last(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape
) -> Call:
    """Input and weights are converted now, the output stays channels_last."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return _conv2d(x, weight, bias, shape)


def _through_channels_last(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape
) -> Call:
    """NCHW in, NCHW out, every conversion in the call."""
    return lambda: _channels_last(x, weight, bias, shape)().contiguous()


def _autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape
) -> Call:
    """float32 in, float32 out, the casts in the call."""
    conv2d = _conv2d(x, weight, bias, shape)

    def call() -> torch.Tensor:
        with torch.autocast(x.device.type, torch.float16):
            return conv2d().float()

    return call


def _compiled(mode: str) -> Callable[..., Call]:
    """torch.compile in a mode, compiled now."""

    def prepare(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape
    ) -> Call:
        arguments = shape.conv_args()

        def conv2d(
            x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            return F.conv2d(x, weight, bias, **arguments)

        with torch._dynamo.config.patch(recompile_limit=64):  # a shape is a compilation
            compiled = torch.compile(conv2d, mode=mode, dynamic=False, fullgraph=True)
            compiled(x, weight, bias)
        return lambda: compiled(x, weight, bias)

    return prepare


@dataclass(frozen=True)
class Peer:
    """PyTorch's own convolution under given settings: what a rung is compared with.

    Attributes:
        name: in records and figures.
        idea: in a line, for tables.
        precision: class of its rounding.
        benchmark: whether cudnn.benchmark is on: cuDNN tries its algorithms at the first call.
        prepared: (x, weight, bias, shape) to the call that is timed; what it makes before,
            converted tensors and compiled functions, is not.
    """

    name: str
    idea: str
    precision: Precision
    benchmark: bool = False
    prepared: Callable[..., Call] = _conv2d

    makes_output: ClassVar[bool] = True  # see `check.Method`

    @property
    def key(self) -> str:
        """Its name: a peer is not built here."""
        return self.name

    def prepare(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: ConvShape,
    ) -> Call:
        """Make what may be made beforehand; the call that is left, which gives (N, K, OH, OW).

        Shapes: x (N, C, H, W), weight (K, C / groups, R, S), bias (K,), all as `shape` has them.

        Raises what PyTorch raises: torch.OutOfMemoryError, or the compiler's errors.
        """
        with convolution_flags(self.precision, self.benchmark), torch.no_grad():
            call = self.prepared(x, weight, bias, shape)

        def run() -> torch.Tensor:
            with convolution_flags(self.precision, self.benchmark), torch.no_grad():
                return call()

        return run

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: ConvShape,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Convolve; PyTorch makes the output, `out` is not used."""
        return self.prepare(x, weight, bias, shape)()


PEERS = (
    Peer("nn.Conv2d", "PyTorch's default, TF32", "tf32"),
    Peer("nn.Conv2d, strict fp32", "TF32 forbidden, cuDNN's fastest", "fp32", benchmark=True),
)
"""nn.Conv2d as PyTorch ships it (TF32 allowed), and with TF32 forbidden and cudnn.benchmark."""

ALL_PEERS = (
    *PEERS,
    Peer("cudnn.benchmark", "nn.Conv2d, TF32, as cuDNN times it best", "tf32", benchmark=True),
    Peer(
        "channels_last",
        "the same, input, weights and output channels_last",
        "tf32",
        benchmark=True,
        prepared=_channels_last,
    ),
    Peer(
        "channels_last, converting",
        "the same, converted from NCHW and back in the call",
        "tf32",
        benchmark=True,
        prepared=_through_channels_last,
    ),
    Peer("autocast fp16", "nn.Conv2d under autocast, back to fp32", "fp16", prepared=_autocast),
    Peer("torch.compile", "nn.Conv2d, compiled", "tf32", prepared=_compiled("default")),
    Peer(
        "torch.compile, max-autotune",
        "without CUDA graphs",
        "tf32",
        prepared=_compiled("max-autotune-no-cudagraphs"),
    ),
)
"""Every way to have PyTorch compute it: what `asymconv bench --record` times beside the rungs."""

COMPILED = tuple(peer for peer in ALL_PEERS if peer.name.startswith("torch.compile"))
"""Those that take long to prepare: up to half a minute for each shape."""


@dataclass(frozen=True)
class Timing:
    """One method, timed on one shape.

    Attributes:
        name: of the rung, peer or ceiling.
        kind: what it is to the ladder.
        precision: class of rounding, "" where that means nothing.
        milliseconds: every repeat, in the order measured.
        error: ‖y - ref‖ / ‖ref‖ against float64, None for a ceiling.
        source_hash: the rung's, "" for others.
        peak_bytes: device memory beyond input and weights while it ran; the output is in it, what a
            peer prepared before is not.
        flops: floating-point operations that it does; 0 where that means nothing.
        bytes: that it must move in device memory, or in L2 ("L2 read"); 0 likewise.
        defines: a rung's tile constants where they are not its own.
    """

    name: str
    kind: Kind
    precision: Precision | Literal[""]
    milliseconds: tuple[float, ...]
    error: float | None = None
    source_hash: str = ""
    peak_bytes: int = 0
    flops: int = 0
    bytes: int = 0
    defines: Mapping[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the repeats in ms."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median of the repeats."""
        return (max(self.milliseconds) - min(self.milliseconds)) / self.median

    @property
    def tflops(self) -> float:
        """TFLOP/s (10^12 operations a second) at the median."""
        return self.flops / self.median / 1e9

    @property
    def gbytes(self) -> float:
        """GB/s (10^9 bytes a second) at the median: least bytes over time."""
        return self.bytes / self.median / 1e6


def time_repeats(
    run: Callable[[], object], count: int, flush: Callable[[], object] | None = None
) -> list[float]:
    """Milliseconds of each of so many calls on the current stream, by CUDA events.

    All are queued before any is waited for. Waiting after each would leave the GPU idle when the
    next one's first event comes, and the event would time the host's way to the launch as well.

    Args:
        run: what is timed.
        count: how often.
        flush: what to do on the GPU before each repeat, if anything; not timed.
    """
    events = []
    for _ in range(count):
        if flush is not None:
            flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def repeats_for(milliseconds: float, budget_ms: float = 1500.0) -> int:
    """How often to repeat what takes so many ms: within a budget, at least 3, at most 60 times."""
    return max(3, min(60, int(budget_ms / max(milliseconds, 1e-3))))


@dataclass
class _Runner:
    """A thing to time, and the repeats so far."""

    name: str
    kind: str
    run: Callable[[], object]
    precision: str = ""
    error: float | None = None
    source_hash: str = ""
    flops: int = 0
    bytes: int = 0
    defines: Mapping[str, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    peak: int = 0

    def timing(self) -> Timing:
        return Timing(
            self.name,
            self.kind,
            self.precision,
            tuple(round(t, 5) for t in self.times),
            self.error,
            self.source_hash,
            self.peak,
            self.flops,
            self.bytes,
            dict(self.defines),
        )


def _peak_bytes(run: Callable[[], object]) -> int:
    """Device memory that a call takes from torch's allocator beyond what was there, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _take_turns(
    runners: Sequence[_Runner],
    buffer: torch.Tensor | None,
    rounds: int = 3,
    budget_ms: float = 1500.0,
    warm_ms: float = WARM_MS,
) -> None:
    """Warm up, then time every runner in each round, with L2 flushed through a buffer if any."""
    first, flushes = [], []
    for runner in runners:
        runner.peak = _peak_bytes(runner.run)  # the first call builds plans and loads modules
        first += time_repeats(runner.run, 1)
        host_ms = _host_ms(runner.run)
        if buffer is None and host_ms > first[-1] / 2:  # else the queue hides the host
            flushes.append(_flush(_l2_twice(), host_ms))
        else:
            flushes.append(None if buffer is None else _flush(buffer, host_ms))
    for turn in range(rounds):
        for runner, once, flush in zip(runners, first, flushes, strict=True):
            count = max(rounds, repeats_for(once, budget_ms))
            warm = min(50, int(warm_ms / once))  # clocks settle to this method's load
            if once < LONG_MS:
                warm = max(1, warm)  # and the first repeat is queued behind something
            for _ in range(warm):
                runner.run()
            share = count // rounds + (turn < count % rounds)
            runner.times += time_repeats(runner.run, share, flush)


def _host_ms(run: Callable[[], object]) -> float:
    """Milliseconds that a call keeps its host at most, of a few calls."""
    slowest = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        slowest = max(slowest, 1e3 * (time.perf_counter() - began))
    return slowest


def _flush(buffer: torch.Tensor, host_ms: float) -> Callable[[], None]:
    """What fills L2 with something else, and takes the GPU longer than a call takes its host."""
    busy_ms = max(HOST_MARGIN * host_ms, HOST_LEAST_MS)
    times = 1 + math.ceil(busy_ms / time_repeats(buffer.zero_, 2)[-1])

    def flush() -> None:
        for _ in range(times):
            buffer.zero_()

    return flush


def _l2_twice() -> torch.Tensor:
    cache = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(2 * cache // 4, device="cuda")


def _flush_buffer(shape: ConvShape) -> torch.Tensor | None:
    cache = torch.cuda.get_device_properties().L2_cache_size
    return None if shape.least_bytes >= L2_MULTIPLE * cache else _l2_twice()


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    shape: ConvShape,
    *,
    rounds: int,
    budget_ms: float,
    warm_ms: float,
) -> dict[str, tuple[float, ...]]:
    """Milliseconds of every repeat of each call on the current GPU, taking turns.

    For calls that are not checked here: the caller has compared their results.

    Args:
        calls: by name.
        shape: the convolution, whose data decide whether caches are flushed between repeats.
        rounds: turns that each call has.
        budget_ms: that each call may take in all, its warm-up apart.
        warm_ms: warm-up before each turn.
    """
    runners = [_Runner(name, "", run) for name, run in calls.items()]
    _take_turns(runners, _flush_buffer(shape), rounds, budget_ms, warm_ms)
    return {runner.name: runner.timing().milliseconds for runner in runners}


def label(method: Method) -> str:
    """A rung's name, with its constants where they are not its own; a peer's name."""
    rung: Rung | None = getattr(method, "rung", None)
    if rung is None:
        return method.key
    return " ".join([rung.name, *(f"{k}={v}" for k, v in getattr(method, "defines", {}).items())])


def time_methods(
    methods: Sequence[Method],
    checks: Sequence[Checked],
    shape: ConvShape,
    *,
    floor: bool = False,
    rounds: int = 3,
    budget_ms: float = 1500.0,
    warm_ms: float = WARM_MS,
) -> list[Timing]:
    """Time methods on the current GPU, taking turns.

    Args:
        methods: built rungs (`build.Kernel`) and peers.
        checks: for each, its passed check on this shape.
        shape: the convolution.
        floor: time the memory floor (`FLOOR`) of this shape with them, as the last.
        rounds: turns that each has.
        budget_ms: that each may take in all, its warm-up apart.
        warm_ms: warm-up before each turn.

    Raises:
        ValueError: a check that is missing, or is of another build or shape.
    """
    passed = {c.key: c for c in checks if c.shape == shape}
    missing = [m.key for m in methods if m.key not in passed]
    if missing:
        raise ValueError(f"no timing without a passed check of {shape}: {', '.join(missing)}")
    data = random_data(shape, "cuda")
    runners = []
    for method in methods:
        rung: Rung | None = getattr(method, "rung", None)
        prepare = getattr(method, "prepare", None)
        runners.append(
            _Runner(
                name=rung.name if rung else method.key,
                kind="rung" if rung else "peer",
                run=prepare(*data, shape) if prepare else partial(method, *data, shape),
                precision=method.precision,
                error=passed[method.key].error,
                source_hash=rung.source_hash if rung else "",
                flops=shape.flops,
                bytes=shape.least_bytes,
                defines=getattr(method, "defines", {}),
            )
        )
    if floor:
        runners.append(_floor_runner(shape, data[0], data[1]))
    _take_turns(runners, _flush_buffer(shape), rounds, budget_ms, warm_ms)
    return [runner.timing() for runner in runners]


# --- ceilings ------------------------------------------------------------------------------------

_FLOOR_SOURCE = r"""
// Reads all of x once and writes all of y once, 16 bytes a thread: the bytes of a convolution
// without the convolution. Streaming hints: nothing is used twice.
__global__ void stream(const float4* __restrict__ x, float4* __restrict__ y, long long reads,
                       long long writes) {
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < reads; i += step) {
    const float4 v = __ldcs(x + i);
    for (long long j = i; j < writes; j += reads) __stcs(y + j, v);
    if (v.x == 1.5e38f) y[0] = v;  // so that reads without a write are not removed
  }
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream_) {
  const long long reads = (long long)c->N * c->C * c->H * c->W / 4;
  const long long writes = (long long)c->N * c->K * c->OH * c->OW / 4;
  int device, sms;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  stream<<<BLOCKS_PER_SM * sms, 512, 0, (cudaStream_t)stream_>>>((const float4*)x, (float4*)y,
                                                                 reads, writes);
  return (int)cudaGetLastError();
}
"""

FLOOR = Rung(
    name="floor_stream",
    idea="reads the input once and writes the output once, and computes nothing",
    notebook="00_problem",
    source=_FLOOR_SOURCE,
    refusal=lambda shape, defines: None,
    defines={"BLOCKS_PER_SM": 64},
)
"""Not a rung: what device memory alone takes for a convolution's bytes."""

_L2_SOURCE = r"""
// Reads all of x again and again past L1 (.cg): x fits L2, so this is what L2 delivers.
__global__ void read_l2(const float4* __restrict__ x, float* __restrict__ y, int count) {
  float sum = 0.0f;
  for (int turn = 0; turn < TURNS; ++turn) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
      const float4 v = __ldcg(x + (i + turn * 4096) % count);  // another SM's part every turn
      sum += v.x + v.y + v.z + v.w;
    }
  }
  if (sum == 1.5e38f) y[0] = sum;  // so that the reads are not removed
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  int device, sms;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int count = c->N * c->C * c->H * c->W / 4;
  read_l2<<<4 * sms, 512, 0, (cudaStream_t)stream>>>((const float4*)x, y, count);
  return (int)cudaGetLastError();
}
"""

L2_TURNS = 512
L2_SHAPE = ConvShape(1, 1, 1024, 4096, 1, kernel=1)  # 16 MiB, a third of an H100's L2
L2_READ = Rung(
    name="l2_read",
    idea="reads 16 MiB from L2, many times",
    notebook="00_problem",
    source=_L2_SOURCE,
    refusal=lambda shape, defines: None,
    defines={"TURNS": L2_TURNS},
)
"""Not a rung: what L2 delivers to the SMs."""

MATMUL_SIZE = 8192


def _floor_runner(shape: ConvShape, x: torch.Tensor, weight: torch.Tensor) -> _Runner:
    """`FLOOR` on a shape's data; like the rungs it takes its output from torch's allocator."""
    run = partial(build.load(FLOOR, "cuda"), x, weight, None, shape.with_(bias=False))
    return _Runner("memory floor", "ceiling", run, bytes=shape.least_bytes)


def time_ceilings(shape: ConvShape) -> list[Timing]:
    """Time what no kernel beats on the current GPU: memory alone, arithmetic alone.

    The floor (`FLOOR`, this shape's bytes), a device-to-device copy of 1 GiB, reads from L2, and
    square matrix products of 8192 through cuBLAS in fp16, TF32 and fp32. Random data: zeros run
    faster.
    """
    x, weight, _ = random_data(shape, "cuda")
    size = MATMUL_SIZE
    source = torch.rand(2**28, device="cuda")  # 1 GiB, read once and written once
    target = torch.empty_like(source)
    a, b = (torch.rand(size, size, device="cuda") - 0.5 for _ in range(2))
    half_a, half_b = a.half(), b.half()

    def product(precision: str) -> Callable[[], object]:
        def run() -> None:
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = precision
            try:
                torch.mm(a, b)
            finally:
                torch.backends.cuda.matmul.fp32_precision = before

        return run

    l2_read = build.load(L2_READ, "cuda")
    l2_data = (*random_data(L2_SHAPE, "cuda")[:2], None, L2_SHAPE)
    l2_out = torch.empty(L2_SHAPE.output_shape, device="cuda")
    l2_bytes = L2_TURNS * 4 * l2_data[0].numel()
    flops = 2 * size**3
    runners = [
        _floor_runner(shape, x, weight),
        _Runner("copy", "ceiling", lambda: target.copy_(source), bytes=2 * 2**30),
        _Runner("L2 read", "ceiling", lambda: l2_read(*l2_data, l2_out), bytes=l2_bytes),
        _Runner("matmul fp16", "ceiling", lambda: torch.mm(half_a, half_b), flops=flops),
        _Runner("matmul tf32", "ceiling", product("tf32"), flops=flops),
        _Runner("matmul fp32", "ceiling", product("ieee"), flops=flops),
    ]
    _take_turns(runners, None)
    return [runner.timing() for runner in runners]


def build_rungs(
    jobs: Sequence[tuple[Rung, Mapping[str, int]]],
) -> tuple[list[build.Kernel], dict[str, str]]:
    """CUDA kernels of rungs with their defines, those that can be built, and why others cannot."""
    with contextlib.suppress(build.BuildError):
        build.load_all(jobs)  # all at once, into the cache; what fails there fails below
    built: list[build.Kernel] = []
    left_out: dict[str, str] = {}
    for rung, defines in jobs:
        try:
            built.append(build.load(rung, "cuda", defines=defines))
        except build.BuildError as error:
            left_out[rung.name] = str(error)
    return built, left_out


def check_methods(
    methods: Sequence[Method], shape: ConvShape, device: torch.device | str = "cuda"
) -> tuple[list[Method], list[Checked], dict[str, str]]:
    """Check methods on one shape, against the same references.

    Returns:
        The methods that passed, their checks, and for those left out the reason: not enough memory,
        or, for a peer, whatever PyTorch raised; it must not cost a run its rungs.

    Raises:
        AssertionError: a rung's result is wrong.
    """
    expected = Expected(shape, device)
    passed: list[Method] = []
    checks: list[Checked] = []
    left_out: dict[str, str] = {}
    for method in methods:
        try:
            checks.append(check(method, shape, expected=expected))
            passed.append(method)
        except torch.OutOfMemoryError:
            left_out[label(method)] = "not enough device memory"
        except Exception as error:
            if not isinstance(method, Peer):
                raise
            reason = str(error).strip() or "no reason given"
            left_out[label(method)] = f"{type(error).__name__}: {reason.splitlines()[0]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next one's pieces are of other sizes
    return passed, checks, left_out


def time_what_fits(
    methods: Sequence[Method], checks: Sequence[Checked], shape: ConvShape, **settings: Any
) -> tuple[list[Timing], dict[str, str]]:
    """`time_methods`, and without some peers where their copies and workspaces leave no memory.

    All methods are held at once. If they do not fit, nn.Conv2d's default is the only peer; if that
    does not fit, there is none.

    Returns:
        The timings, and why a method is not among them.

    Raises:
        torch.OutOfMemoryError: the rungs alone do not fit.
    """
    rungs = [method for method in methods if not isinstance(method, Peer)]
    default = [method for method in methods if method is PEERS[0]]
    taken = list(methods)
    for fewer in ([*rungs, *default], rungs, None):
        try:
            timings = time_methods(taken, checks, shape, **settings)
            break
        except torch.OutOfMemoryError:
            if fewer is None:
                raise
            taken = fewer
        gc.collect()
        torch.cuda.empty_cache()
    left = [label(method) for method in methods if method not in taken]
    return timings, dict.fromkeys(left, "not enough device memory beside the others")


def check_and_time(
    shape: ConvShape, rungs: Sequence[Rung] = RUNGS, peers: Sequence[Peer] = PEERS
) -> tuple[list[Timing], dict[str, str]]:
    """Build, check and time rungs and peers on the current GPU, all in one run.

    Returns:
        The timings in the order given, peers last, and for each rung or peer that is not among them
        the reason: the shape it refuses, why it could not be built, or why it did not run.

    Raises:
        AssertionError: a rung's result is wrong.
        RuntimeError: nn.Conv2d itself does not run here, and there is nothing to compare with.
        torch.OutOfMemoryError: nothing fits.
    """
    refused = {r.name: reason for r in rungs if (reason := r.refuses(shape))}
    built, not_built = build_rungs([(r, {}) for r in rungs if r.name not in refused])
    methods, checks, failed = check_methods([*built, *peers], shape)
    if (default := PEERS[0].name) in failed:
        raise RuntimeError(f"{default} does not run: {failed[default]}")
    timings, crowded = time_what_fits(methods, checks, shape)
    if default in crowded:
        raise RuntimeError(f"{default} does not run: {crowded[default]}")
    return timings, refused | not_built | failed | crowded


def check_and_sweep(shape: ConvShape, rungs: Sequence[Rung], peers: Sequence[Peer]) -> list[Timing]:
    """Build, check and time the variants of rungs, beside peers, on the current GPU in one run.

    Variants that refuse the shape are left out.

    Raises:
        AssertionError: a variant's result is wrong.
        BuildError: a variant does not compile.
    """
    jobs = [
        (rung, variant)
        for rung in rungs
        for variant in rung.variants
        if not rung.refuses(shape, variant)
    ]
    methods: list[Method] = [*build.load_all(jobs), *peers]
    return time_methods(methods, [check(method, shape, "cuda") for method in methods], shape)
