"""nn.Conv2d against asymconv.Conv2d: layer by layer, call by call, and in a whole network.

Two records come from here: `Layers` (figures/data/layers.json) and `Network`
(figures/data/network.json). Every result is compared before it is timed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from asymconv import build, dispatch, op, record
from asymconv.check import check, random_data, tolerance
from asymconv.kernels import Precision, Rung, get_rung
from asymconv.layers import Conv2d, convert, explain
from asymconv.measure import convolution_flags, time_calls
from asymconv.problem import ConvShape
from asymconv.real_layers import BATCHES, LAYERS, RealLayer

LAYERS_RECORD = record.DATA_FOLDER / "layers.json"
NETWORK_RECORD = record.DATA_FOLDER / "network.json"

THEIRS, OURS = "nn.Conv2d", "asymconv.Conv2d"

IMAGE_CHANNELS = 4  # up to that many, the input is the image, which needs no gradient
ROUNDS, BUDGET_MS, WARM_MS = 5, 200.0, 15.0  # of a call: two minutes for the whole list
PAIR_ROUNDS, PAIR_WARM_MS = 25, 2.0  # of nn.Conv2d and ours
HOPELESS = 3.0  # a rung so many times slower than nn.Conv2d is not timed further


# --- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRow:
    """One layer, batch and direction.

    Attributes:
        data, network: as `RealLayer` has them.
        shape: the convolution, with its batch.
        training: forward with backward, or forward alone.
        tf32: the flags it ran under.
        runs: the rung's name, or "" for PyTorch's own.
        reason: `asymconv.explain`'s.
        error: ‖ours - theirs‖ / ‖theirs‖ of the outputs.
        milliseconds: every repeat of nn.Conv2d, of asymconv.Conv2d, and, forward, of the rungs
            that could run it as well.
    """

    data: str
    network: str
    shape: ConvShape
    training: bool
    tf32: bool
    runs: str
    reason: str
    error: float
    milliseconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median in ms of `THEIRS`, `OURS` or a rung's number. Raises KeyError."""
        return statistics.median(self.milliseconds[name])

    @property
    def ratio(self) -> float:
        """How many times faster ours is: nn.Conv2d's median over ours."""
        return self.median(THEIRS) / self.median(OURS)


@dataclass(frozen=True)
class Overhead:
    """What a call costs on the host, on a layer too small to matter.

    Attributes:
        what: the call.
        theirs, ours: microseconds of nn.Conv2d and of asymconv.Conv2d, medians.
    """

    what: str
    theirs: float
    ours: float


@dataclass(frozen=True)
class Layers:
    """A record of rows from one GPU in one run.

    Attributes:
        made: where and with what (`record.environment`).
        rungs: each rung's source hash, as it was timed.
        first_use: seconds to build a rung, and to load it from the cache, by its number.
        overheads: host time of calls.
        rows: the layers.
    """

    made: Mapping[str, str | int]
    rungs: Mapping[str, str]
    first_use: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    overheads: tuple[Overhead, ...] = ()
    rows: tuple[LayerRow, ...] = ()

    def save(self, path: Path) -> None:
        """Write the record; the file is whole or not there."""
        record.write_json(path, asdict(self))


def load_layers(path: Path = LAYERS_RECORD) -> Layers:
    """Read a record of layers.

    Raises:
        FileNotFoundError: there is none; says how to make it.
    """
    data = record.read_json(path, "asymconv layers --record")
    rows = []
    for row in data["rows"]:
        shape = ConvShape(**row.pop("shape"))
        times = {name: tuple(ms) for name, ms in row.pop("milliseconds").items()}
        rows.append(LayerRow(**row, shape=shape, milliseconds=times))
    first_use = {name: tuple(seconds) for name, seconds in data["first_use"].items()}
    overheads = tuple(Overhead(**o) for o in data["overheads"])
    return Layers(data["made"], data["rungs"], first_use, overheads, tuple(rows))


@dataclass(frozen=True)
class _Dispatched:
    """`asymconv.op.conv2d` under given flags, as `check` wants it."""

    precision: Precision
    key: str = OURS

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: ConvShape,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with convolution_flags(self.precision):
            return op.conv2d(x, weight, bias, **shape.conv_args())


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def _agree(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], allowed: float, where: str
) -> float:
    """The largest difference; AssertionError if it is beyond what is allowed."""
    errors = [_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert all(error <= allowed for error in errors), f"{where}: off by {errors}, {allowed} allowed"
    return max(errors, default=0.0)


def _step(layer: nn.Conv2d, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Forward with backward: the output, and the gradients of the parameters and of x."""
    wanted = [*layer.parameters(), *([x] if x.requires_grad else [])]
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, wanted, grad)


def _layer_pair(shape: ConvShape, weight: torch.Tensor) -> dict[str, nn.Conv2d]:
    """nn.Conv2d and asymconv.Conv2d with the same weights."""
    pair = {}
    for name, cls in ((THEIRS, nn.Conv2d), (OURS, Conv2d)):
        layer = cls(
            shape.in_channels,
            shape.out_channels,
            shape.kernel,
            padding=shape.padding,
            stride=shape.stride,
            dilation=shape.dilation,
            groups=shape.groups,
            bias=False,
            device="meta",
        )
        layer.weight = nn.Parameter(weight)
        pair[name] = layer
    return pair


CANDIDATES = ("k05", "k06", "k07", "k08")
"""Rungs that dispatch may choose, or might."""


def _candidates(shape: ConvShape, tf32: bool, chosen: Rung | None, device: str) -> Iterator[Rung]:
    """Rungs beside the chosen one that might be faster than nn.Conv2d: 3×3, one group."""
    if shape.kernel != (3, 3) or shape.groups > 1 or device != "cuda":
        return
    capability = torch.cuda.get_device_capability()
    for rung in map(get_rung, CANDIDATES):
        fits = rung.applies(shape) and rung.runs_on(capability)
        if rung is not chosen and fits and (rung.precision == "tf32") == tf32:
            yield rung


def compare_layer(layer: RealLayer, batch: int, device: str = "cuda") -> list[LayerRow]:
    """Compare and time one layer: forward, and forward with backward.

    Raises:
        AssertionError: a result is wrong.
    """
    shape = layer.shape.with_(batch=batch)
    precision: Precision = "tf32" if layer.tf32 else "fp32"
    allowed = 2 * tolerance(precision, shape.terms).norm  # both may be off
    # a weight's gradient sums over all pixels, in whatever order
    pixels = batch * shape.out_height * shape.out_width
    allowed_gradients = 2 * tolerance(precision, max(shape.terms, pixels)).norm
    where = f"{layer.network}, {shape}"
    x, weight, _ = random_data(shape, device)
    pair = _layer_pair(shape, weight)
    with convolution_flags(precision):
        decision, *_ = op.decide_call(x, weight, None, *shape.conv_args().values())
        if decision.rung is not None:  # against float64, and exact on integers
            with dispatch.always(decision.rung.number):  # one image may be too few to win
                check(_Dispatched(precision), shape.with_(batch=1), device)
        rows = []
        for training in (False, True):
            x.requires_grad_(training and shape.in_channels > IMAGE_CHANNELS)
            if training:
                grad = torch.randn(shape.output_shape, device=device)
                calls = {n: functools.partial(_step, m, x, grad) for n, m in pair.items()}
            else:
                calls = {n: functools.partial(_forward, m, x) for n, m in pair.items()}
            results = {name: call() for name, call in calls.items()}
            error = _agree(results[OURS][:1], results[THEIRS][:1], allowed, where)
            _agree(results[OURS][1:], results[THEIRS][1:], allowed_gradients, where)
            if not training:
                for rung in _candidates(shape, layer.tf32, decision.rung, device):
                    kernel = build.load(rung, device)
                    run = functools.partial(kernel, x, weight, None, shape)
                    _agree([run()], results[THEIRS], allowed, f"{rung.number}, {where}")
                    calls[rung.number] = run
            del results
            rows.append(
                LayerRow(
                    layer.data,
                    layer.network,
                    shape,
                    training,
                    layer.tf32,
                    decision.rung.name if decision.rung else "",
                    decision.reason,
                    error,
                    _time(calls, shape),
                )
            )
    return rows


def _forward(layer: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor]:
    with torch.no_grad():
        return (layer(x),)


def _time(
    calls: Mapping[str, Callable[[], object]], shape: ConvShape
) -> dict[str, tuple[float, ...]]:
    """Every repeat in ms; of rungs that are far slower than nn.Conv2d three repeats will do."""
    rungs = set(calls) - {THEIRS, OURS}
    quick = time_calls(calls, shape, rounds=1, budget_ms=0, warm_ms=0) if rungs else {}
    slow = {n for n in rungs if min(quick[n]) > HOPELESS * min(quick[THEIRS])}
    others = {name: calls[name] for name in calls if name in rungs - slow}
    settings = {"rounds": ROUNDS, "budget_ms": BUDGET_MS, "warm_ms": WARM_MS}
    times = time_calls(others, shape, **settings) if others else {}
    # these two by turns of a few calls: their ratio is the point, and clocks drift
    pair = {name: calls[name] for name in (THEIRS, OURS)}
    pair_times = time_calls(
        pair, shape, rounds=PAIR_ROUNDS, budget_ms=BUDGET_MS, warm_ms=PAIR_WARM_MS
    )
    return quick | times | pair_times


def measure_first_use(
    rungs: Sequence[Rung], backend: build.Backend = "cuda"
) -> dict[str, tuple[float, float]]:
    """Seconds to build each rung in an empty cache, and to load it from there.

    Rungs that this process has loaded already are loaded anew.
    """
    seconds = {}
    chosen = os.environ.get("ASYMCONV_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ASYMCONV_CACHE"] = folder
        try:
            for rung in rungs:
                took = []
                for _ in range(2):
                    build.forget(rung)
                    start = time.perf_counter()
                    build.load(rung, backend)
                    took.append(round(time.perf_counter() - start, 4))
                seconds[rung.number] = (took[0], took[1])
        finally:
            if chosen is None:
                del os.environ["ASYMCONV_CACHE"]
            else:
                os.environ["ASYMCONV_CACHE"] = chosen
    return seconds


OVERHEADS: Mapping[str, tuple[ConvShape, bool]] = {
    "1×1, never a rung's": (ConvShape(1, 1, 4, 4, 1, 1), False),
    "3×3, too small for a rung": (ConvShape(1, 64, 4, 4, 64, 3, padding=1), False),
    "3×3, a rung forced": (ConvShape(1, 64, 4, 4, 64, 3, padding=1), True),
}
"""Layers too small to matter, and whether `dispatch.always` is on."""

DETOURS = {"3×3, a rung forced, in a function mode": OVERHEADS["3×3, a rung forced"]}
"""Likewise, within a mode that looks at every function: such calls go the long way."""


def measure_overheads(
    device: str = "cuda",
    cases: Mapping[str, tuple[ConvShape, bool]] = OVERHEADS,
    calls: int = 200,
    turns: int = 15,
    within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> list[Overhead]:
    """Host time of calls, nn.Conv2d and asymconv.Conv2d in turns, within a context if told."""
    found = []
    for what, (shape, force) in cases.items():
        x, weight, _ = random_data(shape, device)
        pair = _layer_pair(shape, weight)
        for training in (False, True):
            times: dict[str, list[float]] = {name: [] for name in pair}
            with torch.set_grad_enabled(training):
                for turn in range(turns + 1):
                    for name, layer in pair.items():
                        with dispatch.always() if force else contextlib.nullcontext(), within():
                            took = _host_time(layer, x, calls)
                        if turn:  # the first warms up
                            times[name].append(1e6 * took / calls)
            medians = {name: round(statistics.median(t), 3) for name, t in times.items()}
            direction = "with gradients" if training else "without gradients"
            found.append(Overhead(f"{what}, {direction}", medians[THEIRS], medians[OURS]))
    return found


def _host_time(layer: nn.Module, x: torch.Tensor, calls: int) -> float:
    """Seconds until `calls` calls are queued."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        layer(x)
    return time.perf_counter() - start


def measure_layers(
    layers: Sequence[RealLayer] = LAYERS,
    batches: Sequence[int] = BATCHES,
    path: Path | None = None,
) -> Iterator[Layers]:
    """Measure on the current GPU; yields the record so far, after saving it if a path is given.

    Raises:
        AssertionError: a result is wrong.
    """
    rungs = [get_rung(number) for number in CANDIDATES]
    rungs = [rung for rung in rungs if rung.runs_on(torch.cuda.get_device_capability())]
    so_far = Layers(
        record.environment(),
        {rung.number: rung.source_hash for rung in rungs},
        measure_first_use(rungs),
        (*measure_overheads(), *measure_overheads(cases=DETOURS, within=BaseTorchFunctionMode)),
    )
    for layer in layers:
        for batch in batches:
            so_far = replace(so_far, rows=(*so_far.rows, *compare_layer(layer, batch)))
            if path is not None:
                so_far.save(path)
            yield so_far


# --- a network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A record of one network before and after `convert`.

    Attributes:
        made: where and with what (`record.environment`), empty without a GPU.
        input_shape: (N, C, H, W).
        explained: for each convolution, by its name in the network, `asymconv.explain`'s line.
        errors: ‖logits - reference‖ / ‖reference‖ before and after; the reference is the network
            before, under flags that forbid TF32.
        difference: ‖after - before‖ / ‖before‖ of the logits.
        losses: of the training steps, before and after.
        forward, training: every repeat in ms, before and after; none without a GPU.
        peak_bytes: device memory that training takes beyond models and images, before and after.
    """

    made: Mapping[str, str | int]
    input_shape: tuple[int, ...]
    explained: Mapping[str, str]
    errors: Mapping[str, float]
    difference: float
    losses: Mapping[str, tuple[float, ...]]
    forward: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    training: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the record; the file is whole or not there."""
        record.write_json(path, asdict(self))


def load_network(path: Path = NETWORK_RECORD) -> Network:
    """Read a record of a network.

    Raises:
        FileNotFoundError: there is none; says how to make it.
    """
    data = record.read_json(path, "asymconv network --record")
    for name in ("losses", "forward", "training"):
        data[name] = {key: tuple(values) for key, values in data[name].items()}
    return Network(**data | {"input_shape": tuple(data["input_shape"])})


LOGITS_FACTOR = 1.5
"""Ours may be off from the strict result by so many times what nn.Conv2d itself is."""

LOSS_TOLERANCE = 1e-2
"""Losses may differ by so much, relatively: rounding differences grow from step to step."""


def explained(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """`explain` for every convolution of a network on this input, by its name.

    x has the shape that the network takes. Raises what the network raises.
    """
    lines: dict[str, str] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda layer, inputs, name=name: lines.update({name: explain(inputs[0], layer)})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return lines


def compare_network(
    make: Callable[[], nn.Module],
    input_shape: tuple[int, int, int, int],
    device: str = "cpu",
    steps: int = 5,
) -> Network:
    """A network before and after `convert`: logits, losses of SGD steps, time and memory.

    Args:
        make: the network, which gives logits (N, classes, H, W) for images (N, C, H, W).
        input_shape: of the images.
        device: where; times and memory on "cuda" alone.
        steps: of training, on one batch.

    Raises:
        AssertionError: logits or losses differ by more than the class of rounding explains.
    """
    torch.manual_seed(0)
    before = make().to(device)
    models = {THEIRS: before, OURS: convert(copy.deepcopy(before))}
    x = torch.rand(input_shape, device=device)

    logits = {}
    with torch.no_grad():
        for name, model in models.items():
            logits[name] = model.eval()(x)
        with convolution_flags("fp32"):
            strict = before(x)
    errors = {name: _difference(out, strict) for name, out in logits.items()}
    allowed = LOGITS_FACTOR * errors[THEIRS] + 1e-6
    assert errors[OURS] <= allowed, f"logits are off by {errors}"
    difference = _difference(logits[OURS], logits[THEIRS])
    lines = explained(models[OURS], x)

    target = torch.randint(strict.shape[1], (input_shape[0], *strict.shape[2:]), device=device)
    del logits, strict
    forward = _network_times({n: functools.partial(_forward, m, x) for n, m in models.items()}, x)
    losses, training, peaks, runs = {}, {}, {}, {}
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
        runs[name] = functools.partial(_train, model, optimizer, x, target)
        if x.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            there = torch.cuda.memory_allocated()
        losses[name] = tuple(runs[name]().item() for _ in range(steps))
        if x.is_cuda:
            peaks[name] = torch.cuda.max_memory_allocated() - there
        optimizer.zero_grad()  # what stays of one model must not count for the other
    for ours, theirs in zip(losses[OURS], losses[THEIRS], strict=True):
        assert abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs), f"losses: {losses}"
    training = _network_times(runs, x)
    made = record.environment() if x.is_cuda else {}
    return Network(made, input_shape, lines, errors, difference, losses, forward, training, peaks)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """One training step; its loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _network_times(
    calls: Mapping[str, Callable[[], object]], x: torch.Tensor
) -> dict[str, tuple[float, ...]]:
    """Every repeat in ms, taking turns; nothing without a GPU."""
    if not x.is_cuda:
        return {}
    n, c, h, w = x.shape
    return time_calls(calls, ConvShape(n, c, h, w, 1), rounds=5, budget_ms=1500, warm_ms=50)


def notebook_network() -> Callable[[], nn.Module]:
    """The network that notebook 09 defines, in its cells with the tag "network": class `UNet`."""
    import nbformat

    from asymconv import study

    (path,) = study.notebooks(["09"])
    cells = nbformat.read(path, as_version=4).cells
    names: dict[str, Any] = {"torch": torch}  # imported by a cell before
    for cell in cells:
        if "network" in cell.metadata.get("tags", ()):
            exec(compile(cell.source, str(path), "exec"), names)
    return names["UNet"]
