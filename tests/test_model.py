"""ModelNew beside Model: same weights, same results, same kinds of exception."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from conftest import gpu
from torch import nn

from asymconv import Model, ModelNew, build, dispatch, explain, op
from asymconv.check import tolerance
from asymconv.measure import convolution_flags

DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]

ARGUMENTS = [
    dict(in_channels=3, out_channels=5, kernel_size=3),
    dict(in_channels=3, out_channels=5, kernel_size=3, padding=1, bias=True),
    dict(in_channels=4, out_channels=6, kernel_size=2, stride=2, groups=2),
    dict(in_channels=4, out_channels=4, kernel_size=3, dilation=2, groups=4, bias=True),
    dict(in_channels=2, out_channels=3, kernel_size=(1, 3), stride=(2, 1), padding=(0, 1)),
    dict(in_channels=2, out_channels=3, kernel_size=3, padding="same"),
]


def pair_of_models(device: str, **arguments) -> tuple[Model, ModelNew]:
    torch.manual_seed(3)
    model = Model(**arguments)
    torch.manual_seed(3)
    return model.to(device), ModelNew(**arguments).to(device)


def close(ours: torch.Tensor, theirs: torch.Tensor, terms: int) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    bound = 4 * max(tolerance("fp32", terms).norm, tolerance("fp32", terms).element)
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
    assert error <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_same_weights_and_results(arguments: dict, device: str) -> None:
    model, ours = pair_of_models(device, **arguments)
    assert list(model.state_dict()) == list(ours.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    x = torch.rand(2, arguments["in_channels"], 11, 22, device=device)
    with convolution_flags("fp32"):
        if device == "cpu":
            assert torch.equal(ours(x), model(x))
        else:
            close(ours(x), model(x), 100)


@pytest.mark.parametrize("device", DEVICES)
def test_state_dict_both_ways_deepcopy_and_pickle(device: str) -> None:
    model, ours = pair_of_models(device, in_channels=3, out_channels=5, kernel_size=3, bias=True)
    with torch.no_grad():
        model.conv2d.weight.mul_(2)
    ours.load_state_dict(model.state_dict())
    model.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 8, 16, device=device)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device: str) -> None:
    model, ours = pair_of_models(device, in_channels=4, out_channels=6, kernel_size=3, bias=True)
    x = torch.rand(2, 4, 9, 18, device=device)
    grads = []
    with convolution_flags("fp32"):
        for module in (model, ours):
            leaf = x.clone().requires_grad_()
            module(leaf).square().mean().backward()
            grads.append([leaf.grad, module.conv2d.weight.grad, module.conv2d.bias.grad])
    for theirs, own in zip(*grads, strict=True):
        close(own, theirs, 36)


BAD = {
    "wrong rank": lambda d: (torch.rand(3, device=d),),
    "five dimensions": lambda d: (torch.rand(1, 1, 3, 8, 8, device=d),),
    "channels that do not match": lambda d: (torch.rand(1, 4, 8, 8, device=d),),
    "kernel larger than the input": lambda d: (torch.rand(1, 3, 2, 9, device=d),),
    "float64 input": lambda d: (torch.rand(1, 3, 8, 8, device=d, dtype=torch.float64),),
    "integer input": lambda d: (torch.ones(1, 3, 8, 8, device=d, dtype=torch.int32),),
    "other device": lambda d: (torch.rand(1, 3, 8, 8, device="meta" if d == "cpu" else "cpu"),),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_what_conv2d_raises(what: str, device: str) -> None:
    model, ours = pair_of_models(device, in_channels=3, out_channels=5, kernel_size=3)
    outcomes = []
    for module in (model, ours):
        try:
            outcomes.append(module(*BAD[what](device)).shape)
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "arguments",
    [dict(groups=2), dict(kernel_size=0), dict(stride=0), dict(padding=-1)],
    ids=str,
)
def test_bad_arguments_raise_what_conv2d_raises(arguments: dict, device: str) -> None:
    arguments = dict(in_channels=3, out_channels=4, kernel_size=3) | arguments
    outcomes = []
    for cls in (Model, ModelNew):
        try:
            outcomes.append(
                cls(**arguments).to(device)(torch.rand(1, 3, 8, 8, device=device)).shape
            )
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch_and_no_batch(device: str) -> None:
    model, ours = pair_of_models(device, in_channels=3, out_channels=5, kernel_size=3)
    for x in (torch.rand(0, 3, 8, 16, device=device), torch.rand(3, 8, 16, device=device)):
        assert ours(x).shape == model(x).shape


def test_the_operator_on_the_cpu_and_on_meta() -> None:
    x, weight = torch.rand(2, 4, 6, 12), torch.rand(6, 2, 3, 3)
    arguments = ([1, 2], [1, 0], [1, 1], 2)
    y = torch.ops.asymconv.conv2d(x, weight, None, *arguments)
    assert torch.equal(y, torch.conv2d(x, weight, None, *arguments))
    meta = torch.ops.asymconv.conv2d(x.to("meta"), weight.to("meta"), None, *arguments)
    assert meta.shape == y.shape and meta.device.type == "meta"
    sample = (x.requires_grad_(), weight.requires_grad_(), torch.rand(6).requires_grad_())
    torch.library.opcheck(torch.ops.asymconv.conv2d.default, (*sample, *arguments))


@gpu
def test_on_cuda_a_rung_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    launch = build.Kernel.launch

    def spy(self, *args, **kwargs):
        used.append(self.rung)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(build.Kernel, "launch", spy)
    _, ours = pair_of_models("cuda", in_channels=3, out_channels=5, kernel_size=3)
    x = torch.rand(2, 3, 16, 32, device="cuda")
    ours(x)
    assert not used, "a small layer is PyTorch's own"
    with dispatch.always():
        for precision in ("tf32", "fp32"):
            with convolution_flags(precision):
                ours(x)
                assert explain(x, ours).startswith(used[0].name)
            assert precision == "tf32" or used[0].precision == "fp32"
            used.clear()
        ours(x.to(memory_format=torch.channels_last))
    assert not used, "a channels_last input was taken by a rung"


@gpu
def test_without_a_compiler_it_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("ASYMCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(op, "_kernels", {})
    monkeypatch.setattr(op, "_warned", set())

    def none() -> None:
        raise build.MissingToolError("no CUDA compiler: nvcc was not found")

    monkeypatch.setattr(build, "cuda_home", none)
    model, ours = pair_of_models("cuda", in_channels=3, out_channels=5, kernel_size=3)
    x = torch.rand(2, 3, 16, 32, device="cuda")
    with warnings.catch_warnings(record=True) as caught, dispatch.always():
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(ours(x), model(x))
    assert [w for w in caught if "nvcc was not found" in str(w.message)].__len__() == 1


@gpu
def test_autocast_gives_what_conv2d_gives() -> None:
    model, ours = pair_of_models("cuda", in_channels=3, out_channels=5, kernel_size=3)
    x = torch.rand(2, 3, 16, 32, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ours(x).dtype == model(x).dtype == torch.bfloat16


def test_model_new_holds_a_conv2d() -> None:
    assert isinstance(ModelNew(3, 4, 3).conv2d, nn.Conv2d)
