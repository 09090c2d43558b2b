"""Every rung, on both backends, against float64: one body, shapes by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, gpu, nvcc
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from asymconv import accuracy, build
from asymconv.accuracy import HARD
from asymconv.check import check, random_data, reference
from asymconv.check import tolerance as check_tolerance
from asymconv.cpu import EmulationError
from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.problem import CONTRACT, ConvShape

TENSOR_CORES = [rung for rung in RUNGS if rung.capability >= (8, 0)]

ODD_SHAPES = [
    ConvShape(2, 3, 7, 13, 5),
    ConvShape(1, 1, 1, 1, 1, kernel=1),
    ConvShape(3, 4, 5, 9, 6, padding=1, bias=True),
    ConvShape(2, 6, 9, 14, 4, stride=2, padding=(1, 2), groups=2),
    ConvShape(1, 8, 11, 10, 8, kernel=(1, 5), dilation=(1, 2), groups=8, bias=True),
    ConvShape(2, 5, 12, 37, 9, kernel=(5, 3), stride=(3, 1), padding=(4, 0), dilation=(2, 3)),
    ConvShape(8, 7, 6, 70, 17),
    ConvShape(1, 6, 9, 140, 70, padding=1, bias=True),  # several tiles, rows on 16 bytes
    ConvShape(2, 10, 7, 261, 6, padding=(0, 2), groups=2),
    ConvShape(2, 16, 5, 33, 40, padding=1),  # enough weights and outputs for the norm
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


@st.composite
def shapes(draw: st.DrawFn) -> ConvShape:
    """Small convolutions of every kind, odd sizes and borders included."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    two = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    padding = draw(two(0, 3))
    if draw(st.booleans()):  # the usual kind, which some rungs are made for
        kernel, stride, dilation = (3, 3), (1, 1), (1, 1)
    else:
        kernel, stride, dilation = draw(two(1, 4)), draw(two(1, 3)), draw(two(1, 3))
    size = draw(two(1, 20))
    for axis in range(2):
        assume(size[axis] + 2 * padding[axis] >= dilation[axis] * (kernel[axis] - 1) + 1)
    return ConvShape(
        batch=draw(st.integers(1, 4)),
        in_channels=groups * draw(st.integers(1, 6)),
        height=size[0],
        width=draw(st.integers(size[1], 40)),
        out_channels=groups * draw(st.integers(1, 6)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: r.name)
def test_odd_shapes(rung: Rung, shape: ConvShape, backend: str) -> None:
    if reason := rung.refuses(shape):
        pytest.skip(f"{rung.name} refuses: {reason}")
    check(build.load(rung, backend), shape, device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: r.name)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=shapes(), seed=st.integers(0, 2**31 - 2))
def test_any_shape(rung: Rung, backend: str, shape: ConvShape, seed: int) -> None:
    """What a rung admits, it computes; what it refuses, it says."""
    kernel = build.load(rung, backend)
    if rung.refuses(shape):
        x, weight, bias = random_data(shape, device_of(backend), seed)
        with pytest.raises(ValueError, match=rung.name):
            kernel(x, weight, bias, shape)
    else:
        check(kernel, shape, device_of(backend), seed)


@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: r.name)
@pytest.mark.parametrize("order_seed", [1, 2, 3])
def test_thread_order_does_not_matter(rung: Rung, order_seed: int) -> None:
    """Threads in another order, same bits; and no race on shared memory."""
    shape = next(s for s in ODD_SHAPES if rung.applies(s) and s.batch > 1)
    data = random_data(shape, seed=order_seed)
    plain = build.load(rung, "cpu")(*data, shape)
    shuffled = build.load(rung, "cpu-traced")(
        *data, shape, order_seed=order_seed, trace=True, racecheck=True
    )
    assert torch.equal(plain, shuffled)


class InRows:
    """F(2, 3) down the rows in float32, its four sums by PyTorch; `wrong` is added to one tap."""

    key, precision, makes_output = "F(2, 3)", "fp32", True

    def __init__(self, mixes_rows: bool, wrong: float = 0.0) -> None:
        self.mixes_rows, self.wrong = mixes_rows, wrong

    def __call__(self, x, weight, bias, shape: ConvShape, out=None) -> torch.Tensor:
        (top, side), weight = shape.padding, weight.clone()
        weight[-1, -1, 1, 2] += self.wrong
        rows = torch.nn.functional.pad(x, (side, side, top, top + shape.out_height % 2))
        d = [rows[:, :, i : rows.shape[2] - 3 + i : 2] for i in range(4)]
        g = [weight[:, :, i : i + 1] for i in range(3)]
        pairs = (
            (d[0] - d[2], g[0]),
            (d[1] + d[2], ((g[0] + g[2]) + g[1]) / 2),
            (d[2] - d[1], ((g[0] + g[2]) - g[1]) / 2),
            (d[3] - d[1], g[2]),
        )
        m = [torch.nn.functional.conv2d(row, tap) for row, tap in pairs]
        y = torch.stack((m[0] + (m[1] + m[2]), m[3] + (m[1] - m[2])), dim=3).flatten(2, 3)
        y = y[:, :, : shape.out_height]
        return y if bias is None else y + bias[:, None, None]


def test_what_is_allowed_where_rows_are_mixed() -> None:
    """Winograd in float32 needs that bound and passes it; one tap off by 1e-4 does not."""
    shape = ConvShape(2, 1, 31, 49, 130, padding=2)  # corners see one tap, rows cancel the others
    for seed in range(3):
        check(InRows(True), shape, "cpu", seed)
        with pytest.raises(AssertionError, match="an element is off by"):
            check(InRows(False), shape, "cpu", seed)
        with pytest.raises(AssertionError, match="an element is off by"):
            check(InRows(True, wrong=1e-4), shape, "cpu", seed)


def test_a_removed_barrier_is_found() -> None:
    """k04 without the barrier that waits for its tile: the CPU run names the race."""
    rung = get_rung("k04")
    barrier = "    __syncthreads();  // the tile is whole\n"
    assert rung.source.count(barrier) == 1
    broken = replace(rung, source=rung.source.replace(barrier, ""))
    shape = ConvShape(1, 4, 10, 34, 16)
    kernel = build.load(broken, "cpu-traced")
    with pytest.raises(EmulationError, match=r"(?i)race"):
        kernel(*random_data(shape), shape, racecheck=True)
    build.load(rung, "cpu-traced")(*random_data(shape), shape, racecheck=True)


@pytest.mark.parametrize(
    ("removed", "found"),
    [
        (
            "    mbarrier_wait(shared_address(&state->empty[slot]), q / RING & 1);\n",
            "race|deadlock",
        ),
        ("      wait_for_row(state, q + 2);\n", "race"),
        ("      bulk_wait_read();  // the row before has left\n", "race"),
        ("    fence_async_proxy();\n", "no fence.proxy.async"),
        ("  wgmma_wait<0>();\n", "exits without having waited for its wgmma"),
    ],
    ids=["empty", "full", "staging", "proxy fence", "wgmma wait"],
)
def test_k07_without_what_orders_it(removed: str, found: str) -> None:
    """The asynchronous copies and products of k07 lack one thing: the CPU run says what."""
    rung = get_rung("k07")
    assert rung.source.count(removed) == 1
    broken = replace(rung, source=rung.source.replace(removed, ""))
    shape = ConvShape(1, 6, 40, 140, 70, padding=1)
    with pytest.raises(EmulationError, match=found):
        build.load(broken, "cpu-traced")(*random_data(shape), shape, racecheck=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_gives_empty_output(backend: str) -> None:
    shape = ConvShape(0, 3, 5, 6, 2)
    for rung in RUNGS:
        x, weight, bias = random_data(shape, device_of(backend))
        assert build.load(rung, backend)(x, weight, bias, shape).shape == (0, 2, 3, 4)


def test_tensors_that_do_not_fit_are_refused() -> None:
    shape = ODD_SHAPES[0]
    kernel = build.load(RUNGS[0], "cpu")
    x, weight, bias = random_data(shape)
    with pytest.raises(ValueError, match="contiguous float32"):
        kernel(x.double(), weight, bias, shape)
    with pytest.raises(ValueError, match="contiguous float32"):
        kernel(x.to(memory_format=torch.channels_last), weight, bias, shape)
    with pytest.raises(ValueError, match="x has shape"):
        kernel(x[:1], weight, bias, shape)
    shifted = torch.empty(math.prod(shape.output_shape) + 1)[1:].view(shape.output_shape)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        kernel(x, weight, bias, shape, out=shifted)
    with pytest.raises(ValueError, match="weight has shape"):
        kernel(x, weight[:1], bias, shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("rung", TENSOR_CORES, ids=lambda r: r.name)
def test_the_range_of_fp32_is_kept(rung: Rung, case: str, backend: str) -> None:
    """Every element as right as the rung's class has it, whatever the magnitudes."""
    shape = ConvShape(2, 18, 9, 150, 20)
    x, weight, bias = random_data(shape, device_of(backend), seed=5)
    x, weight = HARD[case](x, weight)
    out = torch.full(shape.output_shape, math.nan, device=x.device)
    y = build.load(rung, backend)(x, weight, bias, shape, out=out)
    allowed = check_tolerance(rung.precision, shape.terms).element
    assert accuracy.worst(y, x, weight, shape) <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize(
    "rung", [r for r in TENSOR_CORES if r.precision == "tf32"], ids=lambda r: r.name
)
def test_scaled_inputs_are_not_computed_in_fp32(rung: Rung, scale: float, backend: str) -> None:
    """They would be right, and slow: their errors are those of 11 bits."""
    shape = accuracy.RANGE_SHAPE
    x, weight, _ = random_data(shape, device_of(backend), seed=8)
    y = build.load(rung, backend)(x * scale, weight, None, shape)
    assert accuracy.worst(y, x * scale, weight, shape) >= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rung", TENSOR_CORES, ids=lambda r: r.name)
def test_dark_columns_beside_bright_ones(rung: Rung, backend: str) -> None:
    """Runs are 4 pixels: between bright columns 5 apart one is dark, and its row goes to fp32."""
    shape = accuracy.RANGE_SHAPE
    x, weight, _ = random_data(shape, device_of(backend), seed=6)
    x[..., ::5] *= 1e9
    y = build.load(rung, backend)(x, weight, None, shape)
    assert accuracy.worst(y, x, weight, shape) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("often", [1, 7], ids=["many", "few"])
@pytest.mark.parametrize(
    "shape", [ConvShape(2, 3, 9, 256, 9), ConvShape(1, 5, 12, 141, 20, padding=1)], ids=str
)
@pytest.mark.parametrize("rung", TENSOR_CORES, ids=lambda r: r.name)
def test_dark_runs_among_zeros(rung: Rung, shape: ConvShape, often: int, backend: str) -> None:
    """As after a ReLU: a channel of zeros, 1e-9 here and there, which some outputs see alone."""
    x, weight, _ = random_data(shape, device_of(backend), seed=7)
    x[:, 0] = 0.0
    weight[::2, 1:] = 0.0
    places = [(h, w) for w in (0, 3, 57, 124, 130, shape.width - 1) for h in range(shape.height)]
    for h, w in places[:: often + often // 2]:
        x[:, 0, h, w] = 1e-9 * (1 + h)
    y = build.load(rung, backend)(x, weight, None, shape)
    allowed = check_tolerance(rung.precision, shape.terms).element
    assert accuracy.worst(y, x, weight, shape) <= allowed


@gpu
@pytest.mark.parametrize("rung", TENSOR_CORES, ids=lambda r: r.name)
def test_capture_in_a_cuda_graph(rung: Rung) -> None:
    """Nothing in a launch waits for the host or allocates: a graph replays it on new data."""
    shape = ConvShape(2, 18, 9, 150, 20)
    kernel = build.load(rung, "cuda")
    x, weight, _ = random_data(shape, "cuda")
    y = kernel(x, weight, None, shape)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(x, weight, None, shape, out=y)
    x.copy_(random_data(shape, "cuda")[0])
    graph.replay()
    assert torch.equal(y, kernel(x, weight, None, shape))


def test_the_hash_is_of_what_nvcc_sees() -> None:
    """Comments, white space and what stands there for g++ alone do not make a record stale."""
    rung = get_rung("k01")

    def hash_with(more: str) -> str:
        return replace(rung, source=rung.source + more).source_hash

    expected = hash_with("\nint a;\n#ifdef N\nint b;\n#else\nint c;\n#endif\nint d;\n")
    for same in (
        "  int a; // one\n#ifdef N\nint b; /* two\n */\n#else\nint c;\n#endif\n\nint d;\n",
        "\n#ifdef __CUDACC__\nint a;\n#ifdef N\nint b;\n#else\nint c;\n#endif\n#else\n"
        "#if M\nint e;\n#else\nint f;\n#endif\n#endif // nvcc\nint d;\n",
        "\n#ifndef __CUDACC__\nint e;\n#else\nint a;\n#endif\n#ifdef N\nint b;\n#else\n"
        "#ifdef __CUDACC__\nint c;\n#endif\n#endif\nint d;\n",
    ):
        assert hash_with(same) == expected
    assert hash_with("\nint a;") != hash_with("\nint b;") != rung.source_hash
    with pytest.raises(ValueError, match="#elif"):
        hash_with("\n#ifdef __CUDACC__\n#elif N\n#endif\n")


def test_launches_beyond_cuda_limits_are_refused_with_the_limit() -> None:
    seed = get_rung("k02")
    assert "1024" in seed.refuses(CONTRACT.with_(batch=1025))
    assert "65535" in seed.refuses(ConvShape(1, 1, 3, 70000, 1))
    assert seed.applies(CONTRACT)


def test_reference_is_conv2d_in_float64() -> None:
    shape = ODD_SHAPES[3]
    x, weight, bias = random_data(shape, seed=0)
    want = F.conv2d(x.double(), weight.double(), bias, stride=2, padding=(1, 2), groups=2)
    assert torch.equal(reference(x, weight, bias, shape), want)


class _Wrong:
    """A method with a planted fault."""

    key, precision = "wrong", "fp32"

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def __call__(self, x, weight, bias, shape, out=None):
        out.copy_(F.conv2d(x, weight, bias, **shape.conv_args()))
        self.spoil(out)
        return out


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y[0, 0, 0, 0].fill_(math.nan),
        lambda y: y[-1, -1, -1, -1].mul_(1.001),
        lambda y: y[0, 1].copy_(y[0, 0].clone()),
        lambda y: y.mul_(1 + 1e-4),
    ],
    ids=["a NaN", "one element 0.1 % off", "a channel twice", "all a little off"],
)
def test_the_gate_finds_faults(spoil) -> None:
    shape = ConvShape(2, 8, 12, 24, 16)
    check(_Wrong(lambda y: None), shape)
    with pytest.raises(AssertionError):
        check(_Wrong(spoil), shape)


def test_a_plane_beyond_32_bits_is_refused_where_offsets_are_short() -> None:
    assert "31 bits" in get_rung("k04").refuses(ConvShape(1, 1, 2**15, 2**15, 1))
    assert get_rung("k05").applies(ConvShape(1, 1, 2**15, 2**15, 1))


@gpu
@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: r.name)
def test_offsets_beyond_32_bits(rung: Rung) -> None:
    """2.1 billion inputs and outputs: the last image's offsets need 64 bits."""
    shape = ConvShape(1025, 1, 1024, 2050, 1, kernel=1)
    shape = shape if rung.applies(shape) else shape.with_(batch=1024)
    if reason := rung.refuses(shape):
        pytest.skip(reason)
    x = torch.rand(shape.input_shape, device="cuda").mul_(1024).floor_()  # 11 bits hold them
    weight = torch.full(shape.weight_shape, 2.0, device="cuda")
    assert x.numel() > 2**31
    y = torch.full(shape.output_shape, math.nan, device="cuda")
    build.load(rung, "cuda")(x, weight, None, shape, out=y)
    assert torch.equal(y[-1], 2 * x[-1]) and torch.equal(y[0], 2 * x[0])


# bytes: one nvcc of two keeps 3 registers of k04 in memory, once for each chunk of channels
SPILLED = {"k04": 16}


@nvcc
@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: r.name)
def test_compiles_for_hopper_without_spills(rung: Rung, record_property) -> None:
    report = build.compile_report(rung, "90a")
    assert report.kernels
    assert report.warnings == ()
    for kernel in report.kernels:
        record_property(kernel.function, f"{kernel.registers} registers, {kernel.shared} B shared")
        print(f"{rung.number} {kernel}")
        assert 0 < kernel.registers <= 255
        most = SPILLED.get(rung.number, 0)
        assert max(kernel.spill_stores, kernel.spill_loads, kernel.stack) <= most
