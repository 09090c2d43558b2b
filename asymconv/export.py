"""One Python file that is the layer: CUDA texts, reasoning and wrapper, nothing of this package.

The file is put together from the package's own texts: a rung's CUDA text with its comments, the
docstrings that hold its reasoning, `asymconv.standalone`, and every definition that these use.
KernelBench's static checker refuses `try`, `except` and `pass` wherever they stand, so such a word
is refused here too, with its place; nothing is reworded.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import pprint
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, GenericAlias, ModuleType

from asymconv import kernels, problem, standalone
from asymconv.kernels import Rung
from asymconv.record import write_atomically

FORBIDDEN = re.compile(r"\b(try|except|pass)\b", re.IGNORECASE)
"""Words that KernelBench's static checker takes for a fallback (kernel_static_checker.py)."""


class ExportError(ValueError):
    """A rung cannot be exported; the message says what to change, and where."""


# --- definitions and what they need --------------------------------------------------------------


def _globals_of(code: CodeType) -> Iterator[str]:
    """Names that code looks up outside of functions, in order."""
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not name.startswith("__"):
            yield name
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _constant(name: str, value: object) -> str:
    """An assignment; a text of several lines stands as it reads."""
    if isinstance(value, str) and "\n" in value:
        line = f'{name} = r"""{value}"""'
    else:
        line = f"{name} = {value!r}"
    try:
        same = ast.literal_eval(line.split(" = ", 1)[1]) == value
    except (SyntaxError, ValueError):
        same = False
    if not same:
        raise ExportError(f"{name} cannot be written down as a Python literal")
    return line


class _Definitions:
    """Functions, classes and constants with all that they use, each after what it needs.

    Attributes:
        imports: what is not this package's: modules, with the names taken from each; "" is the
            module itself.
        parts: the definitions' texts.
        known: every name defined, and what it is.
    """

    def __init__(self, outer: _Definitions | None = None, left_out: Sequence[str] = ()) -> None:
        self.outer, self.left_out = outer, set(left_out)
        self.imports: dict[str, set[str]] = outer.imports if outer else {}
        self.parts: list[str] = []
        self.known: dict[str, object] = {}

    def add(self, name: str, module: ModuleType) -> None:
        """Define what a module calls `name`. Raises ExportError."""
        value = vars(module)[name]
        if name in self.left_out or (self.outer and self.outer.known.get(name) is value):
            return
        if name in self.known:
            if self.known[name] is not value:
                raise ExportError(f"{module.__name__} means another thing by {name!r}; rename one")
            return
        self.known[name] = value
        if isinstance(value, ModuleType):
            self._import_module(name, value)
        elif isinstance(value, GenericAlias):
            self.parts.append(f"{name} = {value!r}")
        elif not callable(value):
            self.parts.append(_constant(name, value))
        else:
            self._add_callable(name, inspect.unwrap(value), module)

    def _import_module(self, name: str, module: ModuleType) -> None:
        package, _, last = module.__name__.rpartition(".")
        if name != last:
            raise ExportError(f"{module.__name__} is imported as {name!r}: import it as {last!r}")
        self.imports.setdefault(package or name, set()).add(name if package else "")

    def import_lines(self) -> str:
        """The imports, Python's own first."""

        def lines(module: str) -> Iterator[str]:
            names = sorted(self.imports[module], key=lambda name: (name.upper() != name, name))
            if "" in names:
                yield f"import {module}"
            if named := ", ".join(filter(None, names)):
                yield f"from {module} import {named}"

        groups: tuple[list[str], list[str]] = ([], [])
        for module in self.imports:
            groups[module.split(".")[0] not in sys.stdlib_module_names].extend(lines(module))
        return "\n\n".join("\n".join(sorted(g, key=lambda li: (li[0] == "f", li))) for g in groups)

    def _add_callable(self, name: str, value: object, module: ModuleType) -> None:
        home, own_name = getattr(value, "__module__", None), getattr(value, "__name__", None)
        if home is None or own_name != name:
            raise ExportError(f"{module.__name__}.{name} is not a function or class of that name")
        if not home.startswith("asymconv"):
            self.imports.setdefault(home, set()).add(name)
            return
        source = textwrap.dedent(inspect.getsource(value))
        code = compile(source, home, "exec", dont_inherit=True)  # annotations need theirs too
        origin = sys.modules[home]
        for needed in dict.fromkeys(_globals_of(code)):
            if needed in vars(origin) and needed != name:
                self.add(needed, origin)
            elif not (hasattr(builtins, needed) or needed in source):
                raise ExportError(f"{home}.{name} uses {needed!r}, which is not defined there")
        self.parts.append(source.rstrip())


# --- a rung --------------------------------------------------------------------------------------


def _module_of(rung: Rung) -> ModuleType:
    """A rung's module: it is called as the rung is."""
    try:
        return importlib.import_module(f"{kernels.__name__}.{rung.name}")
    except ModuleNotFoundError as error:
        raise ExportError(f"{rung.name} has no file of its name in asymconv/kernels") from error


def _reasoning(rung: Rung) -> Iterator[tuple[str, str]]:
    """Title and text of the docstrings that tell of a rung: its own, and of what its text is of."""
    module = _module_of(rung)
    yield f"{rung.name}.py", module.__doc__ or ""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        package, _, name = str(node.module).rpartition(".")
        if package == kernels.__name__ and name != "rung":
            yield f"{name}.py", importlib.import_module(str(node.module)).__doc__ or ""


def _refuse_words(where: str, text: str) -> None:
    """Raise ExportError if a text has a word that the checker refuses."""
    found = [
        f"{where}, line {number}, {match[0]!r}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if (match := FORBIDDEN.search(line))
    ]
    if found:
        raise ExportError(
            "an exported file must not have the words try, except or pass, not even in comments; "
            "reword:\n" + "\n".join(found)
        )


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.strip().splitlines())


def _rule(title: str) -> str:
    return f"# --- {title} ".ljust(100, "-")


def _kernel_part(rung: Rung, shared: _Definitions) -> tuple[str, str]:
    """A rung's part of the file, and the expression that makes it a `standalone.Kernel`."""
    number, text = rung.number.upper(), rung.text()
    parts = [_rule(f"{rung.name}: {rung.idea}")]
    for title, reasoning in _reasoning(rung):
        _refuse_words(f"the docstring of asymconv/kernels/{title}", reasoning)
        parts.append(f"# {title}\n#\n{_comment(reasoning)}")
    _refuse_words(f"the CUDA text of {rung.name}", text)
    parts.append(_constant(f"{number}_TEXT", text))

    refusal = rung.refusal
    if not isinstance(refusal, FunctionType) or refusal.__name__ == "<lambda>":
        raise ExportError(f"{rung.name}: its refusal must be a function with a name")
    own = _Definitions(shared)
    own.add(refusal.__name__, sys.modules[refusal.__module__])
    constants = pprint.pformat(dict(rung.defines), width=90, sort_dicts=False)
    body = "\n\n".join([*own.parts, f"return {refusal.__name__}(shape, {constants})"])
    name = f"{rung.number}_refuses"
    parts.append(
        f"def {name}(shape: ConvShape) -> str | None:\n"
        f'    """Why {rung.name} cannot take a shape, or None if it can."""\n\n'
        + textwrap.indent(body, "    ")
    )
    values = f"{rung.name!r}, {rung.precision!r}, {rung.capability!r}, {rung.arch!r}"
    return "\n\n\n".join(parts), f"    Kernel({values}, {name}, {number}_TEXT),"


# --- the file ------------------------------------------------------------------------------------

_HEAD = '''"""ModelNew: nn.Conv2d by CUDA kernels that stand in this file.

It needs PyTorch and nvcc. Made by `asymconv export`; files, figures and notebooks that comments
name are that project's. The kernels, best first, and the hash of each one's text under which its
measurements are recorded:

{kernels}

The first that takes a call runs it. A kernel takes float32 in NCHW on an NVIDIA GPU, if it is for
that GPU and those sizes, and rounds no coarser than PyTorch's flags allow. Whatever none takes,
CPU tensors and bad arguments too, is left to PyTorch's own convolution. A kernel is compiled at its
first call, by torch.utils.cpp_extension.load_inline.
"""'''


def text(rungs: Sequence[Rung]) -> str:
    """The whole file.

    Args:
        rungs: which, best first.

    Raises:
        ExportError: no rung, one twice, a word that KernelBench's checker refuses, or a rung whose
            texts need what cannot be copied.
    """
    if not rungs or len({rung.number for rung in rungs}) < len(rungs):
        raise ExportError("name at least one rung, and each once")
    shared = _Definitions(left_out=["KERNELS"])
    for name in ("get_inputs", "get_init_inputs"):
        shared.add(name, problem)
    contract, shared.parts = shared.parts, []
    for name in ("Kernel", "ModelNew"):
        shared.add(name, standalone)
    made = [_kernel_part(rung, shared) for rung in rungs]
    names = "\n".join(f"- {r.name} ({r.source_hash}): {r.idea}" for r in rungs)
    parts = [
        f"{_HEAD.format(kernels=names)}\n\nfrom __future__ import annotations\n\n"
        + shared.import_lines(),
        _rule("the problem"),
        *contract,
        *(part for part, _ in made),
        _rule("what runs a call"),
        *shared.parts,
        "KERNELS = (\n" + "\n".join(kernel for _, kernel in made) + "\n)",
    ]
    whole = "\n\n\n".join(parts) + "\n"
    _refuse_words("the file", whole)
    return whole


def write(path: Path, rungs: Sequence[Rung]) -> None:
    """Write the file, whole or not at all. Raises what `text` raises, and OSError."""
    write_atomically(path, text(rungs))
