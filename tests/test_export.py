"""The exported file: alone in an empty folder, the layer; and nothing that a checker refuses."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import gpu, nvcc
from typer.testing import CliRunner

from asymconv import Model, build, cpu, export
from asymconv.cli import app
from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.kernels.rung import ENTRY
from asymconv.problem import CONTRACT, ConvShape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, but for what `asymconv export` wrote."""
    folder = tmp_path_factory.mktemp("alone")
    result = CliRunner().invoke(app, ["export", "--output", str(folder / "model_new.py")])
    assert result.exit_code == 0, result.output
    assert [p.name for p in folder.iterdir()] == ["model_new.py"]
    return folder


def loaded(rungs: list[Rung]) -> types.ModuleType:
    """An exported file as a module."""
    module = types.ModuleType("model_new")
    sys.modules[module.__name__] = module
    exec(export.text(rungs), vars(module))
    return module


def run_alone(folder: Path, code: str, **environment: str) -> str:
    """Run Python in a folder where this package cannot be imported."""
    prelude = "import sys; sys.modules['asymconv'] = None; sys.path.insert(0, '')\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ON_THE_CPU = """
import torch
from torch import nn
import model_new

with torch.device("meta"):
    (x,) = model_new.get_inputs()
assert tuple(x.shape) == (8, 64, 512, 1024) and x.dtype == torch.float32
assert model_new.get_init_inputs() == [64, 128, 3]

CASES = [
    ((64, 128, 3), {}),
    ((3, 5, 3), dict(padding=1, bias=True)),
    ((4, 6, 2), dict(stride=2, groups=2)),
    ((4, 4, 3), dict(dilation=2, groups=4, bias=True)),
    ((2, 3, (1, 3)), dict(stride=(2, 1), padding=(0, 1))),
    ((2, 3, 3), dict(padding="same")),
]
for sizes, more in CASES:
    torch.manual_seed(5)
    ours = model_new.ModelNew(*sizes, **more)
    torch.manual_seed(5)
    theirs = nn.Conv2d(*sizes, **{"bias": False, **more})
    wanted = {f"conv2d.{name}": value for name, value in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(wanted)
    assert all(torch.equal(ours.state_dict()[name], wanted[name]) for name in wanted)
    for dtype in (torch.float32, torch.float64):
        x = torch.rand(2, sizes[0], 11, 22, dtype=dtype, requires_grad=True)
        y = ours.to(dtype)(x)
        assert torch.equal(y, theirs.to(dtype)(x)), (sizes, more)
    y.sum().backward()
    theirs_grad = torch.autograd.grad(theirs(x).sum(), x)[0]
    assert torch.equal(x.grad, theirs_grad)
layer = model_new.ModelNew(3, 4, 3)
x = torch.rand(2, 3, 9, 17)
exported = torch.export.export(layer, (x,)).module()
for changed in (torch.jit.script(layer), torch.jit.trace(layer, x), exported):
    assert torch.equal(changed(x), layer(x))
assert torch.equal(torch.func.vmap(layer)(x[None])[0], layer(x))
for bad in (torch.rand(2, 3), torch.rand(1, 5, 9, 9), torch.rand(1, 2, 1, 9)):
    outcomes = []
    for layer in (model_new.ModelNew(2, 3, 3), nn.Conv2d(2, 3, 3, bias=False)):
        try:
            outcomes.append(layer(bad).shape)
        except Exception as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1], outcomes
print("right")
"""


def test_alone_on_the_cpu_it_is_nn_conv2d(folder: Path) -> None:
    assert run_alone(folder, ON_THE_CPU) == "right\n"
    assert [p.name for p in folder.iterdir() if p.name != "__pycache__"] == ["model_new.py"]


def test_it_runs_where_no_module_is(folder: Path) -> None:
    """KernelBench's harness runs the text by `exec`, without a module around it."""
    context: dict[str, object] = {}
    exec((folder / "model_new.py").read_text(), context)
    x = torch.rand(1, 3, 5, 9)
    assert context["ModelNew"](3, 4, 3)(x).shape == (1, 4, 3, 7)


def test_it_imports_python_and_torch_alone(folder: Path) -> None:
    for node in ast.walk(ast.parse((folder / "model_new.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            root = name.split(".")[0]
            assert root == "torch" or root in sys.stdlib_module_names, name


def test_every_name_is_defined_and_every_import_used(folder: Path) -> None:
    pytest.importorskip("ruff", reason="a GPU machine may have torch and pytest alone")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_every_rung_can_be_exported(rung: Rung) -> None:
    """Also what KernelBench's static checker asks of a file (kernel_static_checker.py)."""
    text = export.text([rung])
    assert not export.FORBIDDEN.search(text)
    for word in ("import threading", "multiprocessing", "concurrent.futures", "cuda.Stream("):
        assert word not in text
    for word in ("torch.nn.", "nn.functional", "F.conv", "torch.conv"):  # it warns of these
        assert word not in text
    assert "__global__" in text
    assert "load_inline" in text
    (kernel,) = loaded([rung]).KERNELS
    assert kernel.text == rung.text()
    assert rung.idea in text
    module = sys.modules[f"asymconv.kernels.{rung.name}"]
    for line in (module.__doc__ or "").strip().splitlines():
        assert f"# {line}".rstrip() in text.splitlines(), "the reasoning is not there"


def test_a_word_that_the_checker_refuses_is_named_with_its_place() -> None:
    for comment in ("// they pass it on", "// Try again", "/* all\n * except one */"):
        source = get_rung("k03").source + comment
        rung = dataclasses.replace(get_rung("k03"), source=source)
        with pytest.raises(export.ExportError, match=r"k03_coalesced, line \d+, '(pass|Try|exc)"):
            export.text([rung])
    for fine in ("// a bypass, tested by mbarrier.try_wait", "// exceptional"):
        rung = dataclasses.replace(get_rung("k03"), source=get_rung("k03").source + fine)
        assert fine in export.text([rung])


def test_what_cannot_be_copied_is_refused() -> None:
    k03 = get_rung("k03")
    with pytest.raises(export.ExportError, match="a function with a name"):
        export.text([dataclasses.replace(k03, refusal=lambda shape, defines: None)])
    with pytest.raises(export.ExportError, match="Python literal"):
        export.text([dataclasses.replace(k03, source=k03.source + '// """')])
    with pytest.raises(export.ExportError, match="no file of its name"):
        export.text([dataclasses.replace(k03, name="k03_elsewhere")])
    for rungs in ([], [k03, k03]):
        with pytest.raises(export.ExportError, match="each once"):
            export.text(rungs)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.py"
    result = CliRunner().invoke(app, ["export", "--rung", "k77", "--output", str(path)])
    assert result.exit_code == 1
    assert "no rung 'k77'" in result.output
    assert not path.exists()


SHAPES = [
    CONTRACT,
    CONTRACT.with_(in_channels=65),
    CONTRACT.with_(stride=2, padding=1, bias=True),
    ConvShape(2, 6, 9, 11, 4, kernel=(1, 3), dilation=(1, 2), groups=2),
    CONTRACT.with_(batch=2**20, height=2**10),
    CONTRACT.with_(batch=2048, in_channels=1, height=5, width=5, out_channels=1, kernel=1),
]


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_it_chooses_what_the_rung_takes(rung: Rung) -> None:
    module = loaded([rung])
    (kernel,) = module.KERNELS
    for capability in [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]:
        assert kernel.runs_on(capability) == rung.runs_on(capability)
    for shape in SHAPES:
        theirs = module.ConvShape(**dataclasses.asdict(shape))
        assert kernel.refuses(theirs) == rung.refuses(shape)
        sizes = (shape.stride, shape.padding, shape.dilation, shape.groups, shape.bias)
        for tf32 in (True, False):
            chosen = module.choose((9, 0), tf32, shape.input_shape, shape.weight_shape, *sizes)
            taken = rung.applies(shape) and (tf32 or rung.precision == "fp32")
            assert (chosen is not None) == taken
            assert chosen is None or chosen == (kernel, theirs)


def test_on_the_contract_the_default_runs_hoppers_rung_and_elsewhere_another() -> None:
    module = loaded([get_rung("k07"), get_rung("k06")])

    def number(capability: tuple[int, int], tf32: bool, shape: ConvShape) -> str | None:
        pairs = (shape.stride, shape.padding, shape.dilation)
        sizes = (shape.input_shape, shape.weight_shape, *pairs, shape.groups, shape.bias)
        chosen = module.choose(capability, tf32, *sizes)
        return chosen and chosen[0].name[:3]

    assert number((9, 0), True, CONTRACT) == "k07"
    assert number((9, 0), True, CONTRACT.with_(stride=2)) == "k06"
    assert number((8, 0), True, CONTRACT) == "k06"
    assert number((9, 0), False, CONTRACT) is None
    assert number((7, 5), True, CONTRACT) is None


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_the_layer_is_right_with_its_cuda_text_on_the_cpu(
    rung: Rung, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported layer with the launch handed to the CPU's emulator: struct, pointers, gradients.

    The text that runs is the exported one: `test_every_rung_can_be_exported` compares them.
    """
    module = loaded([rung])
    program = build.load(rung, "cpu").program
    calls = []

    def queue(kernel, device, pointers, conv) -> int:
        calls.append(kernel.name)
        tensors = (x, layer.conv2d.weight, layer.conv2d.bias, y)
        buffers = [
            cpu.Buffer(name, p, 4 * size)
            for name, p, size in zip(
                "xwby", pointers, [0 if t is None else t.numel() for t in tensors], strict=True
            )
            if p is not None
        ]
        arguments = [ctypes.c_void_p(p) for p in pointers]
        return program.call(
            ENTRY, *arguments, ctypes.byref(conv), ctypes.c_void_p(), buffers=buffers
        )

    monkeypatch.setattr(module, "queue", queue)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "choose_for", lambda x, layer: chosen)
    for bias in (False, True):
        shape = ConvShape(2, 5, 6, 11, 7, padding=1, bias=bias)
        sizes = (shape.stride, shape.padding, shape.dilation, shape.groups, shape.bias)
        chosen = module.choose((9, 0), True, shape.input_shape, shape.weight_shape, *sizes)
        torch.manual_seed(2)
        layer = module.ModelNew(5, 7, 3, padding=1, bias=bias)
        torch.manual_seed(2)
        reference = Model(5, 7, 3, padding=1, bias=bias)
        x = torch.randint(-4, 5, shape.input_shape).float().requires_grad_()
        for model in (layer, reference):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(40).round_()  # exact in every rung
        y = torch.empty(shape.output_shape)
        ours, theirs = layer(x), reference(x)
        assert torch.equal(ours, theirs)
        gradients = [
            torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
            for out, model in ((ours, layer), (theirs, reference))
        ]
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)
    assert calls == [rung.name] * 2


def test_what_only_pytorch_differentiates_or_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided before sizes are: within torch.func, in forward mode, and with another padding."""
    module = loaded([get_rung("k07")])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "choose", lambda *sizes: "a kernel")
    chosen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        chosen.append(module.choose_for(x, layer))
        return torch.nn.functional.conv2d(x, layer.weight)

    layer, x = module.ModelNew(2, 3, 3).conv2d, torch.rand(2, 5, 9)
    forward(x[None])
    assert chosen.pop() == "a kernel"
    torch.func.vmap(forward)(x[None])
    torch.func.grad(lambda x: forward(x).sum())(x[None])
    torch.func.jvp(forward, (x[None],), (x[None],))
    with torch.autograd.forward_ad.dual_level():
        forward(torch.autograd.forward_ad.make_dual(x[None], x[None]))
    layer.padding_mode = "circular"
    forward(x[None])
    assert chosen == [None] * 5


def compilers(tmp_path: Path, *libraries: Path) -> dict[str, str]:
    """Environment in which load_inline finds what it needs, a toolkit from pip included."""
    home = build.cuda_home()
    folders = [flag.removeprefix("-L") for flag in build._linkable_cudart(home)]
    found = os.pathsep.join([*folders, *map(str, libraries)])
    return {
        "CUDA_HOME": str(home),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PATH": f"{build.ninja_folder()}{os.pathsep}{os.environ['PATH']}",
        "LIBRARY_PATH": found,
        "LD_LIBRARY_PATH": os.pathsep.join([found, os.environ.get("LD_LIBRARY_PATH", "")]),
    }


BUILD = """
import os
import model_new
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # a CPU torch does not look for it
for kernel in model_new.KERNELS:
    launcher = model_new.launcher(kernel, kernel.arch or "90")
    assert launcher is model_new.launcher(kernel, kernel.arch or "90")
    print(kernel.name)
"""


@nvcc
def test_load_inline_builds_it(folder: Path, tmp_path: Path) -> None:
    """All that needs no GPU: nvcc, the link, the import. A CPU torch has no CUDA libraries to link
    with; empty ones stand in for them."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    if not torch.version.cuda:
        for name in ("c10_cuda", "torch_cuda"):
            command = [build.cxx_compiler(), "-shared", "-x", "c++", "/dev/null"]
            subprocess.run([*command, "-o", str(stubs / f"lib{name}.so")], check=True)
    environment = compilers(tmp_path, stubs)
    assert run_alone(folder, BUILD, **environment).split() == ["k07_hopper_ring", "k06_tensor_core"]


ON_THE_GPU = """
import torch
from torch import nn
import model_new

queued = []
queue = model_new.queue
model_new.queue = lambda kernel, *more: queued.append(kernel.name[:3]) or queue(kernel, *more)


def pair_of_models(*sizes, **more):
    torch.manual_seed(1)
    ours = model_new.ModelNew(*sizes, **more).cuda()
    torch.manual_seed(1)
    return ours, nn.Conv2d(*sizes, **{"bias": False, **more}).cuda()


hopper = torch.cuda.get_device_capability() == (9, 0)
ours, theirs = pair_of_models(*model_new.get_init_inputs())
x = model_new.get_inputs()[0].cuda()
with torch.no_grad():
    y = ours(x)
    assert torch.allclose(theirs(x), y, atol=1e-4, rtol=1e-4)
assert queued == ["k07" if hopper else "k06"], queued
del x, y

for sizes, more, expected in [
    ((64, 32, 3), dict(padding=1, bias=True), "k07" if hopper else "k06"),
    ((96, 40, 3), dict(groups=2, bias=True), "k06"),
    ((6, 8, 5), dict(stride=2, padding=2), "k06"),
]:
    ours, theirs = pair_of_models(*sizes, **more)
    x = torch.rand(2, sizes[0], 33, 70, device="cuda")
    queued.clear()
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().mean().backward()
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    assert queued == [expected], (queued, expected)
    for mine, other in zip(*results):
        error = (mine - other).norm() / other.norm()
        assert error <= 1e-3, error

queued.clear()
double = pair_of_models(3, 4, 3, bias=True)
x = torch.rand(2, 3, 9, 17, device="cuda")
for convert in (lambda t: t.double(), lambda t: t.half()):
    ours, theirs = (convert(layer) for layer in double)
    assert torch.equal(ours(convert(x)), theirs(convert(x)))
ours, theirs = (layer.float() for layer in double)
mine, other = (torch.func.vmap(layer)(x[None]) for layer in (ours, theirs))
assert torch.allclose(mine, other, atol=1e-3)
mine, other = (torch.func.jvp(layer, (x,), (x,))[1] for layer in (ours, theirs))
assert torch.allclose(mine, other, atol=1e-3)
ours.conv2d.padding_mode = theirs.padding_mode = "circular"
assert torch.equal(ours(x), theirs(x))
ours.conv2d.padding_mode = theirs.padding_mode = "zeros"
last = x.to(memory_format=torch.channels_last)
assert torch.equal(ours(last), theirs(last))
torch.backends.cudnn.conv.fp32_precision = "ieee"
assert torch.equal(ours(x), theirs(x))
assert queued == [], queued
print("right")
"""


@gpu
def test_alone_on_the_gpu_it_is_nn_conv2d_by_its_kernels(folder: Path, tmp_path: Path) -> None:
    environment = compilers(tmp_path)
    assert run_alone(folder, ON_THE_GPU, **environment) == "right\n"
