"""The three things in a CUDA text that g++ cannot parse, rewritten in place.

- ``kernel<3><<<grid, block>>>(a, b)`` becomes
  ``EMU_KERNEL(kernel<3>).at(grid, block)(a, b)``;
- ``extern __shared__ float tile[];`` becomes a pointer to the emulator's shared memory;
- CUDA's own headers, and <assert.h>, whose parts emu.h plays, are left out.

All else is for emu.h to define. No line is added or lost, so a ``#line`` at the top is enough for
compiler errors, assertions and memory counts to name the CUDA text's own lines.
"""

from __future__ import annotations

import re

_COMMENT_OR_LITERAL = re.compile(
    r"""
      //[^\n]*
    | /\*.*?\*/
    | R"(?P<tag>[^()\\\s]{0,16})\(.*?\)(?P=tag)"
    | "(?:\\.|[^"\\\n])*"
    | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'     # but not the ' of 1'000
    """,
    re.DOTALL | re.VERBOSE,
)
_LAUNCH = re.compile(r"<<<")
_KERNEL_NAME = re.compile(r"(?:::\s*)?[A-Za-z_]\w*(?:\s*::\s*[A-Za-z_]\w*)*\Z")
_SHARED_ARRAY = re.compile(
    r"""
    (?P<before>(?:(?:__align__|alignas)\s*\([^()]*\)\s*)?)
    \bextern\s+
    (?P<qualifiers>(?:(?:__shared__|volatile|(?:__align__|alignas)\s*\([^()]*\))\s*)+)
    (?P<type>[A-Za-z_:][\w:<>,\s*]*?[\s*>])
    (?P<name>[A-Za-z_]\w*)\s*
    \[\s*\]\s*;
    """,
    re.VERBOSE,
)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[<\"](?P<header>[^>\"\n]*)[>\"]", re.MULTILINE)
_OWN_HEADERS = frozenset(
    {
        "assert.h",
        "cassert",
        "cuda.h",
        "cuda_fp16.h",
        "cuda_runtime.h",
        "cuda_runtime_api.h",
        "device_launch_parameters.h",
        "vector_types.h",
    }
)


class TranslationError(ValueError):
    """A CUDA text with a launch that the translator cannot read; the message names its line."""


def translate(source: str, filename: str = "kernel.cu") -> str:
    """C++ that g++ compiles, line for line the CUDA text.

    Args:
        source: CUDA C++, one translation unit.
        filename: what errors and debug information call it.

    Raises:
        TranslationError: a ``<<<`` without a kernel's name before it or ``>>>(`` after it.
    """
    edits = [
        *_launch_edits(source, _blank_comments_and_literals(source), filename),
        *_shared_array_edits(_blank_comments_and_literals(source)),
        *_include_edits(source),
    ]
    for start, end, text in sorted(edits, reverse=True):
        source = source[:start] + text + source[end:]
    quoted = filename.replace("\\", "\\\\").replace('"', '\\"')
    return f'#include "emu.h"\n#line 1 "{quoted}"\n{source}'


Edit = tuple[int, int, str]  # [start, end) of the source, and what to put there


def _blank_comments_and_literals(source: str) -> str:
    """The text with spaces for everything that is not code; offsets and lines stay."""
    return _COMMENT_OR_LITERAL.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)


def _launch_edits(source: str, code: str, filename: str) -> list[Edit]:
    edits = []
    for launch in _LAUNCH.finditer(code):
        line = code.count("\n", 0, launch.start()) + 1
        name_start = _kernel_start(code, launch.start())
        config_end = _config_end(code, launch.end())
        if name_start is None or config_end is None:
            raise TranslationError(f"{filename}:{line}: cannot read this kernel launch")
        edits.append((name_start, name_start, "EMU_KERNEL("))
        edits.append((launch.start(), launch.end(), ").at("))
        edits.append((config_end, config_end + len(">>>"), ")"))
    return edits


def _kernel_start(code: str, end: int) -> int | None:
    """Where the name before a ``<<<`` begins, its template arguments included."""
    end = len(code[:end].rstrip())
    if code[:end].endswith(">"):
        end = _opening_angle(code, end - 1)
        if end is None:
            return None
        end = len(code[:end].rstrip())
    name = _KERNEL_NAME.search(code, max(0, end - 1000), end)
    return name.start() if name else None


def _opening_angle(code: str, closing: int) -> int | None:
    """The ``<`` of the ``>`` at `closing`; comparisons within parentheses do not count."""
    angles = parentheses = 0
    for i in range(closing, -1, -1):
        character = code[i]
        parentheses += (character in ")]}") - (character in "([{")
        if parentheses < 0 or character == ";":
            return None
        if parentheses == 0:
            angles += (character == ">") - (character == "<")
            if angles == 0:
                return i
    return None


def _config_end(code: str, start: int) -> int | None:
    """Where the ``>>>`` of a launch is that has its arguments after it."""
    depth = 0
    for i in range(start, len(code)):
        character = code[i]
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 or character == ";":
            return None
        if depth == 0 and re.match(r">>>\s*\(", code[i:]):
            return i
    return None


def _shared_array_edits(code: str) -> list[Edit]:
    edits = []
    for array in _SHARED_ARRAY.finditer(code):
        if "__shared__" not in array["qualifiers"]:
            continue
        element = " ".join(array["type"].split())
        if "volatile" in array["qualifiers"]:
            element = f"volatile {element}"
        pointer = (
            f"{element}* const {array['name']} = "
            f"reinterpret_cast<{element}*>(emu::dynamic_shared());"
        )
        edits.append((array.start(), array.end(), pointer + "\n" * array.group().count("\n")))
    return edits


def _include_edits(source: str) -> list[Edit]:
    return [
        (include.start(), include.end(), f"// {include.group().strip()}")
        for include in _INCLUDE.finditer(source)
        if include["header"] in _OWN_HEADERS
    ]
