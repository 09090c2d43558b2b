"""Conv2d, convert and the operator as people use them, beside nn.Conv2d.

On a CPU the operator runs rungs too: `dispatch.always` sends calls to their emulation.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from asymconv import Conv2d, Model, ModelNew, build, convert, dispatch, explain, op
from asymconv.check import tolerance
from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.problem import CONTRACT

DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
OPERATOR = torch.ops.asymconv.conv2d

SERVED = dict(in_channels=4, out_channels=6, kernel_size=3, padding=1)


@pytest.fixture
def strict() -> None:
    """TF32 forbidden by the old flags: torch.export reads them, and does not bear a mixture."""
    torch.backends.cudnn.allow_tf32 = False  # conftest's fixture puts it back


@pytest.fixture
def by_k05(strict: None) -> Iterator[None]:
    """Every call that k05 takes is run by it, on the CPU by its emulation."""
    with dispatch.always("k05"):
        yield


def pair(device: str = "cpu", **arguments: object) -> tuple[nn.Conv2d, Conv2d]:
    """nn.Conv2d and Conv2d, drawn from the same seed."""
    layers = []
    for cls in (nn.Conv2d, Conv2d):
        torch.manual_seed(3)
        layers.append(cls(**arguments, device=device))
    return layers[0], layers[1]


def close(ours: torch.Tensor, theirs: torch.Tensor, terms: int = 36) -> None:
    assert ours.shape == theirs.shape
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    size = theirs.double().abs().max().clamp_min(1e-30)
    error = (ours.double() - theirs.double()).abs().max() / size
    assert error <= 64 * (terms + 1) * 2.0**-24


# --- the same arguments, results and exceptions, whatever they are --------------------------------

INT_OR_PAIR = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))

ARGUMENTS = st.fixed_dictionaries(
    {
        "in_channels": st.sampled_from([0, 1, 2, 4, 6]),
        "out_channels": st.sampled_from([1, 2, 4, 6]),
        "kernel_size": st.one_of(st.just(3), st.just((3, 3)), INT_OR_PAIR, st.integers(0, 5)),
    },
    optional={
        "stride": st.one_of(INT_OR_PAIR, st.integers(0, 2)),
        "padding": st.one_of(
            st.sampled_from(["same", "valid", "else"]),
            st.integers(-1, 3),
            st.tuples(st.integers(0, 3), st.integers(0, 3)),
        ),
        "dilation": INT_OR_PAIR,
        "groups": st.sampled_from([1, 1, 2, 4, 0]),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular", "other"]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, None]),
    },
)

INPUTS = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([1, 2, 3, 0, None]),
        "height": st.integers(1, 9),
        "width": st.integers(1, 18),
        "layout": st.sampled_from(["NCHW", "NCHW", "channels_last", "every other", "turned"]),
        "channels": st.sampled_from([None, None, None, 3]),
        "same_dtype": st.sampled_from([True, True, True, False]),
    }
)


def make_input(layer: nn.Conv2d, device: str, batch, height, width, layout, channels, same_dtype):
    """An input that suits the layer, but for what it is asked to get wrong."""
    size = (channels or layer.in_channels, height, width)
    size = size if batch is None else (batch, *size)
    x = torch.randn(size, device=device)
    if layout == "every other":
        x = torch.randn((*size[:-1], 2 * width), device=device)[..., ::2]
    elif layout == "turned":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "channels_last" and x.dim() == 4 and (x.is_cuda or x.shape[1] != 1):
        # One channel is left out: PyTorch 2.13's own CPU convolution, where rows have stride 1 and
        # columns more, then reads what nobody wrote; nn.Conv2d differs from itself, 1 in 1,000.
        x = x.to(memory_format=torch.channels_last)
    return x.to(layer.weight.dtype) if same_dtype else x.double()


def outcome(run: Callable[[], object]) -> object:
    """What it returns, or the kind of exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()
    except Exception as error:
        return type(error)


def step(layer: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = layer(x)
    generator = torch.Generator(y.device).manual_seed(1)
    grad = torch.empty(y.shape, dtype=y.dtype, device=y.device).normal_(generator=generator)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("forced", [False, True], ids=["as dispatched", "by a rung"])
@given(arguments=ARGUMENTS, inputs=INPUTS)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_both_do_the_same(strict, device: str, forced: bool, arguments: dict, inputs: dict) -> None:
    made = [outcome(lambda c=cls: c(**arguments, device=device)) for cls in (nn.Conv2d, Conv2d)]
    if isinstance(made[0], type):
        assert made[1] is made[0]
        return
    theirs, ours = made
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = make_input(theirs, device, **inputs)
    wanted = outcome(lambda: step(theirs, x))
    with dispatch.always() if forced else contextlib.nullcontext():
        got = outcome(lambda: step(ours, x))
        if not isinstance(wanted, type):
            assert "\n" not in explain(x, ours)
    if isinstance(wanted, type):
        assert got is wanted
        return
    assert not isinstance(got, type), got
    for own, other in zip(got, wanted, strict=True):
        if forced or device == "cuda":
            assert own.shape == other.shape and own.dtype == other.dtype
            scale = other.double().abs().amax() if other.numel() else 0
            limit = {torch.bfloat16: 2e-2}.get(own.dtype, 1e-4)
            assert ((own.double() - other.double()).abs() <= limit * scale + 1e-5).all()
        else:
            assert own.stride() == other.stride()
            assert own.shape == other.shape and own.dtype == other.dtype
            # strided bfloat16 is left out: PyTorch 2.13's own CPU convolution then reads what
            # nobody wrote; nn.Conv2d differs from itself, 1 in 4,000
            if own.dtype != torch.bfloat16 or max(theirs.stride) == 1:
                assert torch.equal(own, other)


@pytest.mark.parametrize("device", DEVICES)
def test_functional_takes_what_f_conv2d_takes(by_k05: None, device: str, used: list[str]) -> None:
    x, weight = torch.rand(2, 4, 8, 16, device=device), torch.rand(6, 4, 3, 3, device=device)
    for options in (
        {},
        {"stride": [1, 1], "padding": [1, 0], "dilation": [1, 1]},
        {"padding": "same"},
        {"padding": "valid", "bias": torch.rand(6, device=device)},
        {"stride": [2]},
        {"stride": 2, "padding": "same"},
        {"stride": (1.0, 1.0)},
        {"padding": None},
        {"bias": 3.0},
        {"groups": "two"},
    ):
        wanted = outcome(lambda o=options: F.conv2d(x, weight, **o))
        got = outcome(lambda o=options: op.conv2d(x, weight, **o))
        if isinstance(wanted, type):
            assert got is wanted, options
        else:
            close(got, wanted)
    assert len(used) == 4


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # float32 will do: see below
def test_gradients_of_both_orders(by_k05: None, device: str, used: list[str]) -> None:
    """A convolution is linear in each argument: wide differences are exact, even in float32."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    arguments = (x, weight, bias, [1, 1], [1, 0], [1, 1], 1)
    tolerances = dict(eps=0.5, atol=1e-3, rtol=1e-3)
    assert torch.autograd.gradcheck(OPERATOR, arguments, **tolerances)
    assert torch.autograd.gradgradcheck(OPERATOR, arguments, **tolerances)
    assert set(used) == {"k05"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ()])
def test_only_the_gradients_asked_for(by_k05: None, device: str, wanted: tuple[str, ...]) -> None:
    theirs, ours = pair(device, **SERVED)
    x = torch.rand(2, 4, 8, 16, device=device).requires_grad_("x" in wanted)
    for layer in (theirs, ours):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in wanted)
    outputs = [layer(x) for layer in (theirs, ours)]
    assert [y.requires_grad for y in outputs] == [bool(wanted)] * 2
    if wanted:
        for y in outputs:
            y.square().sum().backward()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            if parameter.grad is not None:
                close(parameter.grad, other.grad, 1000)


def test_an_input_changed_after_the_call_is_noticed(by_k05: None) -> None:
    _, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    y = ours(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- the operator among PyTorch's own -------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rung", ["k05", None], ids=["k05", "PyTorch's"])
def test_opcheck(strict: None, device: str, rung: str | None, used: list[str]) -> None:
    x, weight = torch.rand(2, 4, 6, 12, device=device), torch.rand(6, 4, 3, 3, device=device)
    bias = torch.rand(6, device=device)
    sample = tuple(t.requires_grad_() for t in (x, weight, bias))
    with dispatch.always(rung) if rung else contextlib.nullcontext():
        torch.library.opcheck(OPERATOR.default, (*sample, [1, 1], [1, 0], [1, 1], 1))
        torch.library.opcheck(OPERATOR.default, (x.detach(), weight.detach()))
    assert set(used) == ({rung} if rung else set())
    grouped = (x, torch.rand(6, 2, 3, 3, device=device), None, [2, 1], [0, 2], [1, 2], 2)
    torch.library.opcheck(OPERATOR.default, grouped)


def on_cuda(module: nn.Module) -> nn.Module:
    """A module with fake CUDA parameters: `.to` and gradients would want a CUDA build of torch."""
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, device="cuda")
            setattr(layer, name, nn.Parameter(fake, requires_grad=False))
    return module


def test_on_meta_and_fake_tensors() -> None:
    x, weight = torch.rand(2, 4, 6, 12, device="meta"), torch.rand(6, 4, 3, 3, device="meta")
    assert OPERATOR(x, weight).shape == (2, 6, 4, 10)
    with FakeTensorMode(), torch.no_grad():
        y = on_cuda(Conv2d(64, 128, 3))(torch.empty(CONTRACT.input_shape, device="cuda"))
    assert tuple(y.shape) == CONTRACT.output_shape
    with pytest.raises(RuntimeError):
        OPERATOR(x, weight[:, :3])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_graphs_where_no_rung_runs(device: str) -> None:
    """A device that autocast does not know is not asked for it."""
    ours, x = Conv2d(4, 6, 3, device=device), torch.rand(2, 4, 8, 16, device=device)
    graph = torch.export.export(ours, (x,)).graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == [
        "aten.conv2d.default"
    ]
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert compiled(x).shape == ours(x).shape == (2, 6, 6, 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_the_operators_gradients_where_only_pytorch_has_them(dtype: torch.dtype) -> None:
    """Of one image without a batch, and of complex numbers."""
    x, weight = torch.randn(4, 8, 16, dtype=dtype), torch.randn(6, 4, 3, 3, dtype=dtype)
    for image in (x, x[None]):
        grads = []
        for run in (OPERATOR, torch.conv2d):
            both = [t.clone().requires_grad_() for t in (image, weight)]
            grads.append(torch.autograd.grad(run(*both).abs().square().sum(), both))
        for own, other in zip(*grads, strict=True):
            assert torch.equal(own, other)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole_forward_and_backward(by_k05: None, device: str, used: list[str]) -> None:
    theirs, ours = pair(device, **SERVED)
    compiled = torch.compile(ours, fullgraph=True)
    for size in ((2, 4, 8, 16), (2, 4, 8, 18), (3, 4, 10, 20)):  # the later ones are dynamic
        x = torch.rand(size, device=device)
        used.clear()
        got = step(compiled, x)
        assert used == ["k05"], "one call of the rung, in the graph"
        for own, other in zip(got, step(theirs, x), strict=True):
            close(own, other, 1000)


def test_compiled_for_any_size(by_k05: None) -> None:
    """No size is specialized: mark_dynamic raises if one is."""
    torch._dynamo.reset()
    _, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    for axis in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, axis)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(ours, fullgraph=True)
        close(compiled(x), ours(x))
        x = torch.rand(3, 4, 9, 19)
        close(compiled(x), ours(x))


def test_flags_are_asked_when_a_compiled_layer_runs(used: list[str]) -> None:
    theirs, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    with dispatch.always("k06", "k05"):
        compiled = torch.compile(ours, fullgraph=True)
        for allowed, rung in ((False, "k05"), (True, "k06"), (False, "k05")):
            torch.backends.cudnn.allow_tf32 = allowed
            used.clear()
            error = (compiled(x) - theirs(x)).norm() / theirs(x).norm()
            assert used == [rung]
            assert error <= tolerance("tf32" if allowed else "fp32", 36).norm * 2


@pytest.mark.parametrize("strictly", [False, True])
def test_export(by_k05: None, strictly: bool, used: list[str]) -> None:
    theirs, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    sizes = (
        {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},
    )
    program = torch.export.export(ours, (x,), dynamic_shapes=sizes, strict=strictly)
    assert "asymconv.conv2d" in str(program.graph)
    used.clear()
    for size in ((2, 4, 8, 16), (3, 4, 9, 17)):
        x = torch.rand(size)
        close(program.module()(x), theirs(x))
    assert used == ["k05", "k05"]


def exported(
    monkeypatch: pytest.MonkeyPatch, layer: Callable[[], nn.Module], size: tuple[int, ...], **kw
) -> str:
    """The graph that an H100 would export, from tensors that are not there."""
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(size, device="cuda")
        program = torch.export.export(on_cuda(layer()), (x,), **kw)
    return str(program.graph)


def test_what_goes_into_a_graph_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = CONTRACT.input_shape

    def graph(size: tuple[int, ...] = wide, cls: type = Conv2d, **changes: object) -> str:
        arguments = dict(in_channels=64, out_channels=128, kernel_size=3) | changes
        return exported(monkeypatch, lambda: cls(**arguments), size)

    assert "asymconv.conv2d" in graph()
    assert "asymconv.conv2d" in graph(cls=ModelNew)
    assert "asymconv.conv2d" in graph(padding="same", bias=True)
    assert "asymconv.conv2d" in graph(padding=1, padding_mode="reflect")
    for other in (
        dict(kernel_size=1), dict(stride=2), dict(dilation=2), dict(groups=2), dict(out_channels=8)
    ):  # fmt: skip
        assert "asymconv" not in graph(**other), "the compiler knows PyTorch's own better"
    assert "asymconv" not in graph((1, 64, 32, 64)), "few pixels"
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert "asymconv" not in graph()


def test_a_dynamic_batch_is_not_bound_to_what_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of this size does not win, eight do: the operator decides when it runs."""
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    size = (8, 64, 200, 400)
    layer = Conv2d(64, 64, 3)
    assert "asymconv" not in exported(monkeypatch, lambda: layer, (1, *size[1:]))
    assert "asymconv" in exported(monkeypatch, lambda: layer, size)
    assert "asymconv" in exported(monkeypatch, lambda: layer, size, dynamic_shapes=batch)


@pytest.mark.parametrize("strictly", [False, True])
def test_an_older_gpu_keeps_pytorchs_own_in_its_graphs_and_says_why_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch, strictly: bool
) -> None:
    monkeypatch.setattr(dispatch, "_capability", lambda index: (8, 0))

    def graph(layer: nn.Module, size: tuple[int, ...] = CONTRACT.input_shape) -> str:
        with FakeTensorMode(), torch.no_grad():
            x = torch.empty(size, device="cuda")
            return str(torch.export.export(on_cuda(layer), (x,), strict=strictly).graph)

    with pytest.warns(RuntimeWarning, match="this GPU is sm_80") as warned:
        assert "asymconv" not in graph(Conv2d(64, 128, 3))
    assert len([w for w in warned if "asymconv falls back" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="asymconv falls back")
        assert "asymconv" not in graph(Conv2d(64, 128, 3))
        assert "asymconv" not in graph(Conv2d(64, 128, 1)), "no GPU has a rung for it"
        assert "asymconv" not in graph(Conv2d(64, 128, 3), (1, 64, 32, 64))


@pytest.mark.parametrize("device", DEVICES)
def test_transforms_of_torch_func(by_k05: None, device: str) -> None:
    """vmap, grad, jvp, jacobians: PyTorch's own rules, for the layer and for the operator."""
    theirs, ours = pair(device, in_channels=2, out_channels=3, kernel_size=3)
    xs = torch.rand(4, 1, 2, 5, 6, device=device)
    x, weight, bias = xs[0], ours.weight.detach(), ours.bias.detach()
    for run in (ours, lambda x: OPERATOR(x, weight, bias)):
        close(torch.vmap(run)(xs), torch.vmap(theirs)(xs))
        for last in (1, 4):  # a sample is no contiguous piece of memory
            moved = xs.movedim(0, last).contiguous()
            close(torch.vmap(run, last)(moved), torch.vmap(theirs, last)(moved))
        close(torch.func.grad(lambda x, r=run: r(x).square().sum())(x),
              torch.func.grad(lambda x: theirs(x).square().sum())(x))  # fmt: skip
        close(torch.func.jvp(run, (x,), (x,))[1], torch.func.jvp(theirs, (x,), (x,))[1])
        close(torch.func.jacrev(run)(x), torch.func.jacrev(theirs)(x))
        close(torch.func.jacfwd(run)(x), torch.func.jacfwd(theirs)(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangents = [
            torch.autograd.forward_ad.unpack_dual(run(dual)).tangent for run in (ours, theirs)
        ]
    close(*tangents)
    weights = torch.rand(4, 3, 2, 3, 3, device=device)
    many = torch.vmap(lambda x, w: OPERATOR(x, w))(xs, weights)
    close(many, torch.stack([F.conv2d(x, w) for x, w in zip(xs, weights, strict=True)]))
    per_sample = torch.vmap(torch.func.grad(lambda w, x: OPERATOR(x, w).square().sum()), (None, 0))
    want = torch.vmap(torch.func.grad(lambda w, x: F.conv2d(x, w).square().sum()), (None, 0))
    close(per_sample(weight, xs), want(weight, xs))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(by_k05: None, device: str, used: list[str]) -> None:
    theirs, ours = pair(device, **SERVED)
    x = torch.rand(2, 4, 8, 16, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        for y in (ours(x), OPERATOR(x, ours.weight, ours.bias, [1, 1], [1, 1])):
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, theirs(x))
    assert not used
    ours(x)
    assert used == ["k05"]


def test_tensors_that_are_views_of_others(by_k05: None, used: list[str]) -> None:
    theirs, ours = pair(**SERVED)
    x = torch.rand(3, 4, 8, 16)
    close(ours(x[1:]), theirs(x[1:]))
    assert used.pop() == "k05", "a part of a batch is not copied"
    close(ours(torch._neg_view(x)), theirs(-x))
    with torch.inference_mode():
        close(ours(x), theirs(x))
    used.clear()
    for other in (x.to(memory_format=torch.channels_last), x[..., ::2], x[:, :, 1:]):
        y = ours(other)
        assert torch.equal(y, theirs(other)) and y.stride() == theirs(other).stride()
    assert not used, "what is not contiguous is not made contiguous"


class Tagged(torch.Tensor):
    """A subclass that is PyTorch's own matter."""


def test_subclasses_of_tensor_stay_what_they_are(by_k05: None, used: list[str]) -> None:
    _, ours = pair(**SERVED)
    y = ours(torch.rand(1, 4, 8, 8).as_subclass(Tagged))
    assert type(y) is Tagged and not used


def test_torchscript_takes_pytorchs_own_layer(by_k05: None) -> None:
    network = convert(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)))
    x = torch.rand(1, 4, 9, 9)
    for script in (torch.jit.script(network), torch.jit.trace(network, (x,))):
        assert "asymconv::" not in str(script.inlined_graph)
        close(script(x), network(x), 100)
    assert type(network[0]) is Conv2d
    for arguments in (
        dict(padding="same"),
        dict(padding="valid", bias=False),
        dict(padding="same", padding_mode="circular"),
        dict(padding=(2, 1), padding_mode="reflect", stride=2),
    ):
        theirs, ours = pair(in_channels=4, out_channels=6, kernel_size=3, **arguments)
        close(torch.jit.script(ours)(x), theirs(x))


def test_tools_that_look_inside(by_k05: None, used: list[str], tmp_path) -> None:
    """Counting operations, checkpointing, torch.fx, a saved export, vmap in a compiled function."""
    theirs, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16, requires_grad=True)
    counts = []
    for layer in (theirs, ours):
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    for reentrant in (False, True):
        checkpoint(ours, x, use_reentrant=reentrant).sum().backward()
    assert used == ["k05"] * 5, "a checkpoint calls twice"
    close(torch.fx.symbolic_trace(nn.Sequential(ours))(x), theirs(x))
    program = torch.export.export(ours, (x.detach(),))
    torch.export.save(program, tmp_path / "layer.pt2")
    used.clear()
    close(torch.export.load(tmp_path / "layer.pt2").module()(x), theirs(x))
    assert used == ["k05"]
    many = torch.compile(lambda xs: torch.vmap(lambda x: ours(x))(xs), fullgraph=True)
    xs = torch.rand(3, 2, 4, 8, 16)
    close(many(xs), torch.vmap(theirs)(xs))


# --- at once, or through PyTorch's dispatcher -----------------------------------------------------


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of `op.conv2d` that PyTorch's dispatcher sees."""
    seen: list[str] = []
    operator = op._operator

    def spy(*args: object) -> torch.Tensor:
        seen.append("seen")
        return operator(*args)

    monkeypatch.setattr(op, "_operator", spy)
    return seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_call_is_launched_at_once(
    by_k05: None, device: str, bias: bool, used: list[str], dispatched: list[str]
) -> None:
    """With and without gradients, of parameters and of plain tensors, in inference mode too."""
    theirs, ours = pair(device, **SERVED, bias=bias)
    x = torch.rand(2, 4, 8, 16, device=device)
    expected = theirs(x)
    y = ours(x)
    assert type(y) is torch.Tensor and y.requires_grad and not y.is_leaf
    close(y, expected)
    with torch.no_grad():
        y = ours(x)
    assert not y.requires_grad and y.is_contiguous()
    close(y, expected)
    with torch.inference_mode():
        y = ours(x)
        assert y.is_inference()
        close(ours(y[:, :4].contiguous()), theirs(y[:, :4].contiguous()))  # inference's own tensor
    for frozen in (ours.weight.detach(), ours.weight.detach().requires_grad_()):
        y = op.conv2d(x, frozen, ours.bias, padding=1)
        assert y.requires_grad == (frozen.requires_grad or bias)
        close(y, expected)
    for own, other in zip(step(ours, x), step(theirs, x), strict=True):
        close(own, other, 1000)
    assert used == ["k05"] * 7
    assert not dispatched


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # float32 will do: see below
def test_gradients_of_both_orders_at_once(
    by_k05: None, device: str, used: list[str], dispatched: list[str]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    tolerances = dict(eps=0.5, atol=1e-3, rtol=1e-3)
    for arguments in ((x, weight, bias, 1, (1, 0)), (x, weight, None, 1, (1, 0))):
        assert torch.autograd.gradcheck(op.conv2d, arguments, **tolerances)
        assert torch.autograd.gradgradcheck(op.conv2d, arguments, **tolerances)
    assert set(used) == {"k05"} and not dispatched


class Names(TorchDispatchMode):
    """The operators that ran, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """What was called from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [False, True])
def test_who_looks_on_sees_the_operator(by_k05: None, gradients: bool, used: list[str]) -> None:
    theirs, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    expected = theirs(x)
    with torch.set_grad_enabled(gradients):
        ours(x)  # what follows is not the first call
        with Names() as mode:
            close(ours(x), expected)
        assert "asymconv.conv2d.default" in mode.names
        with Functions() as mode:
            close(ours(x), expected)
        assert OPERATOR.default in mode.called
        with FlopCounterMode(display=False) as counter:
            ours(x)
        assert counter.get_total_flops() == 2 * expected.numel() * 36
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            close(ours(x), expected)
        assert op.NAME in {event.key for event in profile.key_averages()}
    assert used == ["k05"] * 5


def test_tensors_that_are_more_than_memory(by_k05: None, dispatched: list[str]) -> None:
    """They say that they are torch.Tensor; PyTorch's dispatcher knows better."""
    theirs, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    left_over: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        left_over.append(x)
        return x.sum()

    torch.func.grad(keep)(x)
    strange = [torch._neg_view(x), torch._efficientzerotensor((2, 4, 8, 16)), *left_over]
    assert {type(tensor) for tensor in strange} == {torch.Tensor}
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            ours(x)
            dispatched.clear()
            for tensor in strange:
                close(ours(tensor), theirs(tensor))
            weight = nn.Parameter(torch._neg_view(ours.weight.detach()))
            close(op.conv2d(x, weight, padding=1), F.conv2d(x, weight, padding=1))
            assert len(dispatched) == len(strange) + 1


def test_what_changes_between_calls_of_the_same_sizes_is_noticed(used: list[str]) -> None:
    theirs, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    weight, bias = ours.weight, ours.bias
    expected = theirs(x)

    def runs(wanted: str | None, x: torch.Tensor = x, layer: nn.Module = ours) -> torch.Tensor:
        used.clear()
        y = layer(x)
        assert used == ([wanted] if wanted else [])
        assert (explain(x, ours)[:3] == wanted) == bool(wanted)
        return y

    for _ in range(2):  # the second time, every look-up finds what the first has left
        assert torch.equal(runs(None), expected)
        with dispatch.always("k06", "k05"):
            torch.backends.cudnn.allow_tf32 = False
            runs("k05")
            torch.backends.cudnn.allow_tf32 = True
            runs("k06")
            with torch.backends.cudnn.flags(enabled=False):
                runs("k05")
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            runs("k05")
            torch.backends.cudnn.conv.fp32_precision = "tf32"
            runs("k06")
            with dispatch.always("k05"):
                close(runs("k05"), expected)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    assert runs(None).dtype == torch.bfloat16
                for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
                    assert torch.equal(runs(None, other), theirs(other))
                assert type(runs(None, x.as_subclass(Tagged))) is Tagged
                used.clear()
                with pytest.raises(RuntimeError):  # PyTorch refuses several dtypes
                    ours(x.double())
                double = x.double(), weight.double(), bias.double()
                assert op.conv2d(*double, padding=1).dtype == torch.float64
                weight.data = weight.data.to(memory_format=torch.channels_last)
                assert torch.equal(ours(x), F.conv2d(x, weight, bias, padding=1))
                weight.data = weight.data.contiguous()
                assert outcome(lambda: op.conv2d(x, weight, bias[:5], padding=1)) is RuntimeError
                for wrong in (dict(stride=(1.0, 1.0)), dict(dilation=1.0), dict(groups=1.0)):
                    wanted = outcome(lambda o=wrong: F.conv2d(x, weight, bias, padding=1, **o))
                    got = outcome(lambda o=wrong: op.conv2d(x, weight, bias, padding=1, **o))
                    assert got is wanted is TypeError
                assert not used
                with torch.no_grad():
                    assert not runs("k05").requires_grad
                assert runs("k05").requires_grad
                ours.requires_grad_(False)
                assert not runs("k05").requires_grad
                assert runs("k05", x.clone().requires_grad_()).requires_grad
                ours.requires_grad_(True)


def test_an_inference_tensor_cannot_be_trained_on(by_k05: None) -> None:
    theirs, ours = pair(**SERVED)
    with torch.inference_mode():
        x = torch.rand(2, 4, 8, 16)
    assert outcome(lambda: ours(x)) is outcome(lambda: theirs(x)) is RuntimeError
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_plans_hold_no_tensors(by_k05: None) -> None:
    _, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    y = ours(x)
    gone = [weakref.ref(t) for t in (x, y, ours.weight)]
    del x, y, ours
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# --- convert --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block as networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect")
        self.twice = self.second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.twice(F.relu(self.norm(self.first(x))))


def test_convert_changes_the_layers_and_nothing_else() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    network[3].weight.requires_grad_(False)
    network[1].eval()
    calls: list[str] = []
    network[0].register_forward_hook(lambda *_: calls.append("after"))
    network[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    before = copy.deepcopy(network)
    modules, parameters = list(network.modules()), list(network.parameters())
    state = network.state_dict()
    modes = [m.training for m in modules]

    assert convert(network) is network

    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert [m.training for m in network.modules()] == modes
    assert network[1].twice is network[1].second
    assert {type(m) for m in network.modules() if isinstance(m, nn.Conv2d)} == {Conv2d}
    assert str(network) == str(before)
    x = torch.rand(2, 3, 12, 24)
    for mode in (False, True):
        outputs = []
        for model in (before, network):
            torch.manual_seed(1)
            outputs.append(model.train(mode)(x))
        assert torch.equal(*outputs)
    assert calls.count("before") == calls.count("after") == 4, "the copy's hooks count too"
    assert list(before.state_dict()) == list(state)
    before.load_state_dict(network.state_dict())
    network.load_state_dict(before.state_dict())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(copy.deepcopy(network[1])))):
        assert any(type(m) is Conv2d for m in other.modules())
    assert convert(network) is network, "once more does no harm"


class Own(nn.Conv2d):
    """Somebody's layer with ways of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Scaled(Conv2d):
    """A subclass that changes what nn.Conv2d's subclasses change: not forward."""

    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


def test_a_conv_forward_of_its_own_is_called(by_k05: None, used: list[str]) -> None:
    x = torch.rand(1, 4, 8, 16)
    theirs, ours = pair(**SERVED)
    ours.__class__ = Scaled
    close(ours(x), 2 * theirs(x))
    assert used == ["k05"]
    of_class = nn.Conv2d._conv_forward
    theirs._conv_forward = lambda i, w, b: 3 * of_class(theirs, i, w, b)
    expected = theirs(x)
    assert torch.equal(convert(theirs)(x), expected)


def test_convert_on_layers_that_are_not_plain(by_k05: None, used: list[str]) -> None:
    x = torch.rand(1, 4, 8, 16)
    lone = nn.Conv2d(**SERVED)
    assert type(convert(lone)) is Conv2d
    assert type(convert(Own(4, 6, 3))) is Own

    for normed in (parametrizations.weight_norm(nn.Conv2d(**SERVED)), spectral_norm(lone).eval()):
        copied = copy.deepcopy(normed)
        convert(normed)
        assert isinstance(normed, Conv2d)
        used.clear()
        close(normed(x), copied(x))
        assert "k05" in used
        assert list(normed.state_dict()) == list(copied.state_dict())
    plain = parametrizations.weight_norm(nn.Conv2d(**SERVED))
    parametrize.remove_parametrizations(convert(plain), "weight")
    assert type(plain) is Conv2d

    lazy = nn.Sequential(nn.LazyConv2d(6, 3))
    convert(lazy)(x)
    assert type(lazy[0]) is nn.Conv2d
    assert type(convert(lazy)[0]) is Conv2d
    network = nn.Sequential(nn.Conv2d(**SERVED))
    inside = torch.compile(network, backend="eager")
    expected = inside(x)
    assert type(convert(inside)._orig_mod[0]) is Conv2d
    close(inside(x), expected)

    transposed = convert(nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Conv1d(4, 6, 3)))
    assert not any(isinstance(m, Conv2d) for m in transposed)


def test_state_dicts_of_the_reference_and_the_layer_go_both_ways() -> None:
    model, ours = Model(3, 4, 3, bias=True), ModelNew(3, 4, 3, bias=True)
    assert isinstance(ours.conv2d, Conv2d)
    ours.load_state_dict(model.state_dict())
    model.load_state_dict(ours.state_dict())
    plain, layer = pair(**SERVED)
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    converted = convert(Model(3, 4, 3, bias=True))
    converted.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(converted(x), ours(x))


# --- explain --------------------------------------------------------------------------------------


def test_explain_on_a_cpu(strict: None) -> None:
    x = torch.rand(1, 4, 8, 16)
    for layer in (Conv2d(**SERVED), nn.Conv2d(**SERVED), ModelNew(4, 6, 3)):
        assert explain(x, layer) == "PyTorch's own: rungs run on CUDA, this is on cpu"
    with dispatch.always("k05"):
        assert explain(x, Conv2d(**SERVED)).startswith("k05_register_tile: ")
        with torch.autocast("cpu"):
            assert "autocast" in explain(x, Conv2d(**SERVED))
        assert "subclass" in explain(x.as_subclass(Tagged), Conv2d(**SERVED))
        assert "padding" in explain(x, Conv2d(4, 6, 2, padding="same"))
        assert "k05: " in explain(x, Conv2d(4, 6, 1))
    with pytest.raises(TypeError, match="Linear"):
        explain(x, nn.Linear(3, 3))


# --- first use, missing tools, other GPUs ---------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """As in a process that has used nothing yet, with an empty cache."""
    monkeypatch.setenv("ASYMCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(op, "_kernels", {})
    monkeypatch.setattr(op, "_warned", set())


def first_calls(count: int, device: str = "cpu") -> list[torch.Tensor]:
    """Calls of one layer from so many threads at once: their outputs."""
    theirs, ours = pair(device, **SERVED)
    x = torch.rand(2, 4, 8, 16, device=device)
    barrier, results = threading.Barrier(count), []

    def call() -> None:
        barrier.wait()
        results.append(ours(x))

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        close(result, theirs(x))
    return results


@pytest.mark.parametrize("device", DEVICES)
def test_first_use_from_many_threads(
    by_k05: None, fresh: None, device: str, used: list[str], tmp_path
) -> None:
    assert len(first_calls(8, device)) == 8
    assert used == ["k05"] * 8
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("k05") and p.is_dir()]) == 1


_PROCESS = """
import sys, torch
from asymconv import Conv2d, dispatch, explain
torch.backends.cudnn.allow_tf32 = False
x, layer = torch.rand(1, 4, 8, 16), Conv2d(4, 6, 3, padding=1)
with dispatch.always("k05"):
    line, y = explain(x, layer), layer(x)
assert (y - torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)).abs().max() <= 1e-5
print(line)
"""


def test_first_use_from_many_processes(fresh: None, tmp_path) -> None:
    """The environment, with the empty cache, is inherited."""
    command = [sys.executable, "-c", _PROCESS]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert out.startswith("k05_register_tile: ")
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("k05") and p.is_dir()]) == 1


def test_without_a_compiler_one_warning_from_many_threads(
    by_k05: None, fresh: None, monkeypatch: pytest.MonkeyPatch, used: list[str]
) -> None:
    tried: list[int] = []

    def none() -> str:
        tried.append(1)
        time.sleep(0.05)  # the other threads come here meanwhile
        raise build.MissingToolError("no C++ compiler: 'g++' is not on PATH")

    monkeypatch.setattr(build, "cxx_compiler", none)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(first_calls(4)) == 4
        explained = explain(torch.rand(1, 4, 8, 16), Conv2d(**SERVED))
    assert [str(w.message) for w in caught] == [
        "asymconv falls back to PyTorch's convolution: no C++ compiler: 'g++' is not on PATH"
    ]
    assert explained == "PyTorch's own: no C++ compiler: 'g++' is not on PATH"
    assert not used
    assert len(tried) == 1, "what is missing is looked for once"


@pytest.mark.parametrize("broken", ["a file", "no folder", "no library"])
def test_a_cache_that_does_not_work_is_one_warning(
    by_k05: None, fresh: None, monkeypatch: pytest.MonkeyPatch, broken: str, tmp_path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    if broken == "no library":
        build.load(get_rung("k05"), "cpu")
        for built in list(tmp_path.rglob("*.so")):  # elsewhere: what is loaded stays loaded
            copied = tmp_path / "copy" / built.relative_to(tmp_path)
            copied.parent.mkdir(parents=True)
            copied.write_text("this is no library")
        monkeypatch.setenv("ASYMCONV_CACHE", str(tmp_path / "copy"))
        monkeypatch.setattr(build, "_loaded", {})
    else:
        monkeypatch.setenv("ASYMCONV_CACHE", str(file if broken == "a file" else file / "in"))
    theirs, ours = pair(**SERVED)
    x = torch.rand(2, 4, 8, 16)
    with pytest.warns(RuntimeWarning, match="k05_register_tile could not be built or loaded"):
        first = ours(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = ours(x)
        line = explain(x, ours)
    assert torch.equal(first, theirs(x)) and torch.equal(second, first)
    assert line.startswith("PyTorch's own: k05_register_tile could not be built or loaded: ")
    assert "\n" not in line


def test_what_a_compiler_said_is_in_the_warning_and_explain_is_one_line(
    by_k05: None, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise build.CompileError("g++ failed (1):\nkernel.cpp:3: error: no such thing")

    monkeypatch.setattr(build, "_build_cpu", refused)
    with pytest.warns(RuntimeWarning, match="no such thing"):
        line = explain(torch.rand(2, 4, 8, 16), Conv2d(**SERVED))
    assert line == "PyTorch's own: g++ failed (1):"


def test_an_older_gpu_warns_once(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are on one; PyTorch's convolution, in C++, sees that they are here."""
    machine = "k07 was measured on sm_90, this GPU is sm_80"
    theirs, ours = pair(in_channels=48, out_channels=64, kernel_size=3)
    x = torch.rand(1, 48, 492, 1026)  # 501,760 output pixels
    expected = theirs(x)
    with monkeypatch.context() as there, torch.no_grad():
        there.setattr(dispatch, "_capability", lambda index: (8, 0))
        there.setattr(torch.Tensor, "is_cuda", True)
        there.setattr(torch.Tensor, "device", torch.device("cuda", 0))
        with pytest.warns(RuntimeWarning, match=machine):
            first = ours(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = ours(x)
            assert machine in explain(x, ours)
    close(first, expected)
    close(second, expected)


def test_import_builds_nothing_and_is_quick() -> None:
    program = (
        "import sys, time, torch; start = time.perf_counter(); import asymconv; "
        "took = time.perf_counter() - start; "
        "assert 'torch._dynamo' not in sys.modules and 'asymconv.comparison' not in sys.modules; "
        "assert not asymconv.build._loaded and not torch.cuda.is_initialized(); print(took)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.0


# --- on a GPU -------------------------------------------------------------------------------------


def wide(device: str = "cuda", bias: bool = True) -> tuple[nn.Conv2d, Conv2d, torch.Tensor]:
    """A layer that rungs serve, and an input."""
    theirs, ours = pair(device, in_channels=64, out_channels=128, kernel_size=3, bias=bias)
    return theirs, ours, torch.rand(2, 64, 512, 1024, device=device)


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


hopper = pytest.mark.skipif(not on_hopper(), reason="no GPU of compute capability 9.0")


@pytest.fixture(params=[True, False], ids=["TF32 allowed", "forbidden"])
def serves(request: pytest.FixtureRequest) -> str:
    """The rung that takes a wide layer under these flags, which hold for the test."""
    torch.backends.cudnn.allow_tf32 = request.param
    return "k07" if request.param else "k08"


@hopper
def test_a_wide_layer_is_run_by_a_rung(serves: str, used: list[str]) -> None:
    theirs, ours, x = wide()
    y = ours(x)
    assert used == [serves]
    assert explain(x, ours).startswith(serves)
    allowance = 2 * tolerance(get_rung(serves).precision, 576).norm
    assert (y - theirs(x)).norm() <= allowance * y.norm()
    used.clear()
    ours(x.to(memory_format=torch.channels_last))
    assert not used


@hopper
def test_cuda_graphs_and_streams(serves: str, used: list[str]) -> None:
    theirs, ours, x = wide()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        y = ours(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert (y - theirs(x)).norm() <= 1e-3 * y.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = ours(x)
    assert used == [serves, serves]
    for _ in range(2):
        x.uniform_()
        graph.replay()
        with torch.no_grad():
            assert (y - theirs(x)).norm() <= 1e-3 * y.norm()


@hopper
def test_a_first_call_in_a_capture_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, used: list[str]
) -> None:
    monkeypatch.setattr(op, "_kernels", {})
    monkeypatch.setattr(op, "_warned", set())
    theirs, ours, x = wide()
    with torch.no_grad():
        theirs(x)
        graph = torch.cuda.CUDAGraph()
        with pytest.warns(RuntimeWarning, match="call it once before"), torch.cuda.graph(graph):
            y = ours(x)
        graph.replay()
        assert (y - theirs(x)).norm() <= 1e-3 * y.norm()
    assert not used
    ours(x)
    assert used == ["k07"], "outside of the capture it is built"


@hopper
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_gpu(serves: str, used: list[str]) -> None:
    theirs, ours, x = wide("cuda:1")
    with torch.cuda.device(0):
        got = step(ours, x)
    assert used == [serves]
    for own, other in zip(got, step(theirs, x), strict=True):
        assert own.device == x.device
        assert (own - other).norm() <= 2e-3 * other.norm()
    mixed = [outcome(lambda m=m: m(x.to("cuda:0"))) for m in (theirs, ours)]
    assert mixed[0] is mixed[1] and isinstance(mixed[0], type)


@hopper
def test_compiled_on_hopper_with_cuda_graphs(serves: str, used: list[str]) -> None:
    theirs, ours, x = wide()
    with torch.no_grad():
        for mode in (None, "reduce-overhead"):
            compiled = torch.compile(ours, fullgraph=True, mode=mode)
            for _ in range(3):
                y = compiled(x).clone()
            assert (y - theirs(x)).norm() <= 1e-3 * y.norm()
    assert set(used) == {serves}
    for own, other in zip(step(torch.compile(ours), x), step(theirs, x), strict=True):
        assert (own - other).norm() <= 2e-3 * other.norm()


@gpu
@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: r.name)
def test_every_rung_is_right_under_the_layer(rung: Rung, used: list[str]) -> None:
    if not rung.runs_on(torch.cuda.get_device_capability()):
        pytest.skip(f"{rung.name} does not run on this GPU")
    torch.backends.cudnn.allow_tf32 = rung.precision == "tf32"
    theirs, ours = pair("cuda", **SERVED)
    x = torch.rand(2, 4, 16, 32, device="cuda")
    with dispatch.always(rung.number):
        y = ours(x)
    assert used == [rung.number]
    exact = theirs.double()(x.double())
    assert (y - exact).norm() <= tolerance(rung.precision, 36).norm * exact.norm()
