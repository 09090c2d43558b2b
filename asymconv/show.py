"""What notebook cells show: kernels, differences, counts and records, as Markdown.

The notebooks hold text and calls; what they call for showing stands here. Everything shown is the
same on every machine, unless its name says `here`.
"""

from __future__ import annotations

import difflib
import io
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from IPython.display import SVG, Markdown
from matplotlib.figure import Figure
from PIL import Image

from asymconv import (
    ablations,
    accuracy,
    build,
    comparison,
    cpu,
    dispatch,
    hints,
    plots,
    predictions,
    profiler,
    record,
    tables,
)
from asymconv import asymmetry as experiments
from asymconv import strips as moves
from asymconv.check import check, random_data
from asymconv.kernels import Rung, half_range, ptx
from asymconv.problem import ConvShape


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> Markdown:
    """A Markdown table; the first columns are texts, the others are numbers, right-aligned."""
    lines = [list(headers), [":--"] * texts + ["--:"] * (len(headers) - texts)]
    lines += [[str(cell) for cell in row] for row in rows]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def kernel(rung: Rung) -> Markdown:
    """A rung's CUDA text, kernel and launcher, as nvcc gets it (behind the prelude).

    Texts that rungs share, wrappers of PTX instructions and the like, are named and left out.
    """
    text = rung.source
    for module in (ptx, half_range):
        for name, shared in vars(module).items():
            if name.isupper() and isinstance(shared, str):
                path = module.__name__.replace(".", "/")
                text = text.replace(shared, f"// {name} of {path}.py stands here\n")
    return Markdown(f"```cpp\n{text.strip()}\n```")


def excerpt(rung: Rung, *names: str) -> Markdown:
    """Functions or structs of a rung's CUDA text, with the comments above them.

    Raises:
        KeyError: the text defines no such name at the start of a line.
    """
    lines, parts = rung.text().splitlines(), []
    for name in names:
        pattern = re.compile(rf"^\S.*\b{name}\b\s*(\(|\{{)|^ +{name}\(")
        found = [i for i, line in enumerate(lines) if pattern.match(line)]
        found = [i for i in found if not lines[i].lstrip().startswith(("//", "return", "#"))]
        if not found:
            raise KeyError(f"{rung.name} defines no {name}")
        first = last = found[0]
        while first > 0 and lines[first - 1].strip():
            first -= 1
        while not lines[last].startswith("}") and not lines[last].endswith("; }"):
            last += 1
        parts.append("\n".join(lines[first : last + 1]))
    return Markdown("```cpp\n" + "\n\n".join(parts) + "\n```")


def loop(rung: Rung, first: str) -> Markdown:
    """One loop of a rung's CUDA text, whole.

    Args:
        rung: whose text.
        first: how the loop's first line begins.

    Raises:
        KeyError: the text does not have exactly one such loop.
    """
    return Markdown("```cpp\n" + "\n".join(_loop_lines(rung, first)) + "\n```")


def piece(rung: Rung, first: str, last: str) -> Markdown:
    """Some lines of a rung's CUDA text.

    Args:
        rung: whose text.
        first: how the first of them begins.
        last: how the last of them begins, the next one after the first that does.

    Raises:
        KeyError: the text does not have exactly one such first line, or no such last one.
    """
    lines, begin, indent = _only(rung, first, "lines")
    end = next((i for i in range(begin, len(lines)) if lines[i].lstrip().startswith(last)), None)
    if end is None:
        raise KeyError(f"{rung.name} has no line {last!r} after {first!r}")
    text = "\n".join(line.removeprefix(indent) for line in lines[begin : end + 1])
    return Markdown(f"```cpp\n{text}\n```")


def _only(rung: Rung, first: str, what: str) -> tuple[list[str], int, str]:
    """A rung's lines, which of them alone begins so, and its indent; raises KeyError."""
    lines = rung.source.splitlines()
    found = [i for i, line in enumerate(lines) if line.lstrip().startswith(first)]
    if len(found) != 1:
        raise KeyError(f"{rung.name} has {len(found)} {what} {first!r}")
    line = lines[found[0]]
    return lines, found[0], line[: -len(line.lstrip())]


def _loop_lines(rung: Rung, first: str) -> list[str]:
    """The lines of the loop of a rung's text whose first line begins so; raises KeyError."""
    lines, begin, indent = _only(rung, first, "loops")
    end = next(i for i in range(begin, len(lines)) if lines[i] == indent + "}")
    return [line.removeprefix(indent) for line in lines[begin : end + 1]]


def difference(before: Rung, after: Rung, loop: str | None = None) -> Markdown:
    """What a rung changes in the CUDA text of another: lines out (-), in (+), and around.

    Of whole texts, a line that only moves to the right, into a new loop, counts as it was.

    Args:
        before, after: the rungs.
        loop: how the first line of a loop begins in both; then that loop alone, whole.

    Raises:
        KeyError: one of them does not have exactly one such loop.
    """
    old, new = (
        rung.source.strip().splitlines() if loop is None else _loop_lines(rung, loop)
        for rung in (before, after)
    )
    same = (text if loop else [line.strip() for line in text] for text in (old, new))
    matcher = difflib.SequenceMatcher(None, *same, autojunk=False)
    lines = [f"--- {before.name}", f"+++ {after.name}"]
    for group in matcher.get_grouped_opcodes(1 if loop is None else 1000):
        lines.append("@@")
        for tag, old_from, old_to, new_from, new_to in group:
            if tag != "equal":
                lines += [f"-{line}" for line in old[old_from:old_to]]
            mark = " " if tag == "equal" else "+"
            lines += [f"{mark}{line}" for line in new[new_from:new_to]]
    return Markdown("```diff\n" + "\n".join(lines) + "\n```")


def compiled(rung: Rung) -> Markdown:
    """What nvcc and ptxas say of a rung here, or that there is no nvcc here."""
    try:
        report = build.compile_report(rung)
    except build.MissingToolError as error:
        return Markdown(f"*Not compiled here: {error}*")
    rows = [
        (f"`{_demangled(k.function)}`", k.registers, k.spill_stores, k.stack)
        for k in report.kernels
    ]
    warnings = "; ".join(report.warnings) or "none"
    header = (f"sm_{report.arch}, warnings: {warnings}", "registers", "spilled bytes", "stack")
    return table(header, rows)


def _demangled(function: str) -> str:
    """A function's name as the source has it; as the linker has it where there is no c++filt."""
    try:
        done = subprocess.run(["c++filt", "-p", function], capture_output=True, text=True)
    except OSError:
        return function
    return done.stdout.strip() or function


def passed(rung: Rung, *shapes: ConvShape) -> Markdown:
    """Check a rung's CUDA text on the CPU: float64, NaN-filled outputs, exact integers.

    Fresh random data at every call. Raises AssertionError if anything is wrong.
    """
    rows = []
    for shape in shapes:
        result = check(build.load(rung, "cpu"), shape)
        rows.append((str(shape), f"{result.elements:,}", "passed"))
    return table(("shape", "outputs compared", rung.name), rows)


def trace(
    rung: Rung, shape: ConvShape, multiprocessors: int = cpu.MULTIPROCESSORS
) -> list[cpu.LineCount]:
    """Count the memory accesses of a rung's CUDA text on the CPU, line by line.

    multiprocessors: of the GPU it stands for; matters to rungs that start as many blocks.
    """
    kernel = build.load(rung, "cpu-traced")
    return kernel.trace(*random_data(shape, seed=0), shape, multiprocessors)


def _statement(lines: Sequence[str], number: int) -> str:
    """The statement that begins on a line, counted from 1, on one line."""
    taken = [lines[number - 1].split("//")[0].strip()]
    while not taken[-1].endswith((";", "{", "}")) and len(taken) < 4:
        taken.append(lines[number - 1 + len(taken)].split("//")[0].strip())
    return " ".join(taken)


def counts(rung: Rung, lines: Sequence[cpu.LineCount]) -> Markdown:
    """The counts of `trace` beside the source lines they belong to."""
    text = rung.text().splitlines()
    rows = []
    for line in lines:
        per_request = (
            f"{line.sectors_per_request:.2f} sectors"
            if line.space == "global"
            else f"{line.wavefronts_per_request:.2f} wavefronts"
        )
        source = _statement(text, line.line).replace("|", "\\|")
        rows.append(
            (
                f"`{source}`",
                f"{line.space} {line.op}, {line.bytes_per_lane}\N{NO-BREAK SPACE}B",
                f"{line.requests:,}",
                f"{line.lanes_per_request:.1f}",
                per_request,
            )
        )
    headers = ("line", "access", "requests", "lanes a request", "per request")
    return table(headers, rows, texts=2)


def made(of: record.Record) -> Markdown:
    """Where a record was made, and with what."""
    m = of.made
    return Markdown(
        f"*Measured on {m['gpu']}: {m['multiprocessors']} SMs, driver {m['driver']}, torch "
        f"{m['torch']}, CUDA {m['cuda']}, cuDNN {m['cudnn']}, {m['date']}, "
        f"revision {m['revision']}.*"
    )


def timings(of: record.Record, names: Sequence[str]) -> Markdown:
    """Medians of a record's methods, with the spread of their repeats, rate and error."""
    rows = []
    for timing in (of[name] for name in names):
        rows.append(
            (
                timing.name,
                plots.significant(timing.median),
                f"{100 * timing.spread:.1f} %",
                plots.significant(timing.tflops),
                "" if timing.error is None else f"{timing.error:.1e}",
            )
        )
    headers = ("method", "median, ms", "(max - min) / median", "TFLOP/s", "error against float64")
    return table(headers, rows)


def here() -> Markdown:
    """Whether what follows was measured on this machine's own GPU or is the published record."""
    if record.ladder_path() == record.LADDER:
        return Markdown(
            "*Shown: the published record. "
            "On a machine with a GPU, `asymconv study` measures anew.*"
        )
    return Markdown("*Shown: this machine's own GPU, measured in this run.*")


def ceilings(of: record.Record) -> Markdown:
    """What the record's GPU delivers at most: bytes and operations a second."""
    rows = []
    for timing in of.of_kind("ceiling"):
        tflops = plots.significant(timing.tflops)
        rate = f"{timing.gbytes:,.0f} GB/s" if timing.bytes else f"{tflops} TFLOP/s"
        rows.append((timing.name, plots.significant(timing.median), rate))
    return table(("ceiling", "median, ms", "rate"), rows)


def bounds(of: record.Record) -> Markdown:
    """How long the record's convolution takes at each measured ceiling, at least."""
    return table(tables.FLOOR_HEADERS, tables.floor_rows(of))


def l1_bounds(
    what: str, rows: Sequence[tuple[str, float, float] | tuple[str, float, float, float]]
) -> Markdown:
    """The least time that L1 allows (`predictions.bound_ms`) beside the measured one.

    Args:
        what: heads the first column.
        rows: at least one: a name, both times in ms and, in all rows or in none, for how many
            percent of the time ncu found L1 busy.
    """
    cells = []
    for name, bound, measured, *busy in rows:
        numbers = (f"{bound:,.0f}", f"{measured:,.0f}", f"{100 * bound / measured:.0f} %")
        cells.append((name, *numbers, *(f"{percent:.0f} %" for percent in busy)))
    headers = (what, "bound of L1, ms", "measured, ms", "bound / measured", "L1 busy, says ncu")
    return table(headers[: len(cells[0])], cells)


class Picture:
    """A figure in a notebook: as SVG, and as a small PNG of the same.

    JupyterLab does not show an SVG output of a notebook that it does not trust, one that was
    cloned and not yet run; a PNG it shows. Whoever can show both takes the SVG.
    """

    def __init__(self, drawn: Figure) -> None:
        self.svg = SVG(plots.svg(drawn)).data
        self.png = _png(drawn)
        bold = [text.get_text() for text in drawn.texts if text.get_fontweight() == "bold"]
        self.title = " ".join(bold)

    def __repr__(self) -> str:
        return self.title

    def _repr_mimebundle_(self, **more: object) -> tuple[dict[str, object], dict[str, object]]:
        data = {"image/svg+xml": self.svg, "image/png": self.png, "text/plain": self.title}
        return data, {"image/png": {"width": round(plots.WIDTH / 0.75)}}  # CSS has 0.75 pt a pixel


def _png(drawn: Figure) -> bytes:
    """A figure with 1.5 pixels for each of CSS, in 256 colours: some 40 kB.

    Colours far apart are kept, not those that are frequent: a method's marker keeps its own.
    """
    buffer = io.BytesIO()
    with plots.style():
        drawn.savefig(buffer, format="png", dpi=1.5 * 72 / 0.75)
    few = Image.open(buffer).convert("RGB")
    few = few.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def figure(drawn: Figure) -> Picture:
    """A figure of `asymconv.plots`, as the notebook shows it."""
    return Picture(drawn)


def warp(rung: Rung, shape: ConvShape, *accesses: str) -> Picture:
    """Where one warp's lanes touch memory: its first request of each access, traced on the CPU.

    Args:
        rung: whose CUDA text is run.
        shape: a small convolution.
        accesses: "load x", "load w", "store y", ... in the order wanted.

    Raises:
        KeyError: the kernel makes no such access.
    """
    traced = build.load(rung, "cpu-traced")
    traced.trace(*random_data(shape, seed=0), shape)
    first: dict[str, plots.Request] = {}
    for request in traced.program.requests():
        name, _ = next(lane for lane in request.lanes if lane is not None)
        offsets = [None if lane is None else lane[1] for lane in request.lanes]
        label = f"{request.op} {name}"
        first.setdefault(label, plots.Request(label, offsets, request.bytes_per_lane))
    source = f"addresses of block 0, warp 0, traced on the CPU: {rung.name} on {shape}"
    return figure(plots.sectors([first[a] for a in accesses], rung.number, source))


_UNITS = {"bytes": (1e9, "GB"), "percent": (1, "%"), "milliseconds": (1, "ms")}
_LABELS = {
    "l1_hit_percent": "sectors found in L1",
    "l2_hit_percent": "sectors found in L2",
    "l1_wavefront_percent": "L1 and shared memory busy",
    "l2_percent": "L2 busy",
    "dram_percent": "device memory busy",
    "dram_read_bytes": "read from device memory",
    "dram_write_bytes": "written to device memory",
    "fma_percent": "fp32 units busy, with addresses too",
    "lsu_percent": "load/store units busy",
    "tensor_percent": "tensor cores' instructions, of what can be issued",
    "occupancy_percent": "warps there, of 64 an SM can have",
}


def counters(of: profiler.Profile, names: Sequence[str], rungs: Sequence[str]) -> Markdown:
    """Hardware counters of some rungs side by side, from the record."""
    rows = []
    for name in names:
        factor, unit = _UNITS.get(name.rsplit("_", 1)[-1], (1e9, "billion"))
        label = _LABELS.get(name, name.replace("_", " "))
        numbers = [f"{of[rung][name] / factor:,.4g} {unit}" for rung in rungs]
        rows.append((label, *numbers))
    return table(("counter (ncu)", *rungs), rows)


def occupancy(what: str, of: Mapping[str, profiler.Counters], threads: int) -> Markdown:
    """Registers of kernels, the blocks that fit an SM with them, and how full ncu found it.

    Args:
        what: heads the first column.
        of: each one's counters, by what stands in that column.
        threads: of a block.
    """
    rows = []
    for name, taken in of.items():
        registers = int(taken["registers"])
        blocks = predictions.blocks_that_fit(registers, threads)
        rows.append((name, registers, blocks, f"{taken['occupancy_percent']:.0f} %"))
    return table((what, "registers a thread", "blocks that fit an SM", "occupancy"), rows)


def proof(of: profiler.Profile, rung: Rung) -> Markdown:
    """Counts of the CPU run beside ncu's counters, on `profiler.PROOF`: the same text, both ways.

    The CPU counts accesses as written in the source; ncu counts what nvcc made of them. Below the
    table stands, for each difference that is understood, the reason and the SASS that shows it.
    Copies from global to shared memory (cp.async) are among the shared stores.
    """
    hardware = of.of(rung.name, profiler.PROOF)
    rows: list[tuple[str, ...]] = []
    notes: dict[str, list[str]] = {}  # by reason: the counters it explains
    lines_here = trace(rung, profiler.PROOF, int(of.made["multiprocessors"]))
    for counter, count, measured in profiler.beside(lines_here, hardware):
        if not count and not measured:
            continue
        name, more = counter.replace("_", " "), measured - count
        difference = f"{more:+,} ({100 * more / count:+.1f} %)" if more else "same"
        rows.append((name, f"{count:,}", f"{measured:,}", difference))
        why = profiler.added(rung, counter)
        if why and why.count == more:
            reason = f"{why.reason} (`{why.line}`, {why.sass})"
            notes.setdefault(reason, []).append(f"{name} {more:+,}")
    title = f"{rung.number} on {profiler.PROOF}"
    lines = table((title, "CPU run", "ncu, H100", "difference"), rows).data
    if notes:
        lines += "\n\nWhat nvcc adds to the source:\n"
    for reason, counters_ in notes.items():
        lines += f"\n- *{', '.join(counters_)}*: {reason}."
    return Markdown(lines)


def variants(of: record.Record, rung: str, names: Sequence[str]) -> Markdown:
    """Times of a rung with other values of these constants, fastest first."""
    its = (t for t in of.timings if t.name.startswith(rung) and set(names) <= set(t.defines))
    timings_ = sorted(its, key=lambda t: t.median)
    rows = [(*(t.defines[n] for n in names), plots.significant(t.median)) for t in timings_]
    return table((*names, "median, ms"), rows)


def halo(rung: Rung, tiles: Sequence[tuple[int, int]], shape: ConvShape) -> Markdown:
    """What each tile of a rung (TILE_H, TILE_W) fetches, counted on the CPU, for an output pixel.

    Values are the floats that the lanes ask for; sectors are counted as floats, 8 each.
    """
    pixels = shape.batch * shape.out_height * shape.out_width * shape.in_channels
    rows = []
    for height, width in tiles:
        kernel_ = build.load(rung, "cpu-traced", defines={"TILE_H": height, "TILE_W": width})
        lines = kernel_.trace(*random_data(shape, seed=0), shape)
        text = rung.text().splitlines()
        loads = [ln for ln in lines if (ln.space, ln.op) == ("global", "load")]
        reads = [ln for ln in loads if "image[" in text[ln.line - 1]]
        values = sum(ln.lanes for ln in reads) / pixels
        floats = 8 * sum(ln.sectors for ln in reads) / pixels
        tile = [ln for ln in lines if (ln.space, ln.op) == ("shared", "load")]
        value = next(ln for ln in tile if ln.bytes_per_lane == 4)
        rounds = f"{value.wavefronts_per_request:.2f}"
        rows.append((f"{height} × {width}", f"{values:.2f}", f"{floats:.2f}", rounds))
    headers = (
        "tile",
        "floats fetched a pixel",
        "sectors a pixel, in floats",
        "wavefronts a read of the tile",
    )
    return table(headers, rows)


def layers(path: Path = comparison.LAYERS_RECORD) -> Markdown:
    """The record of `asymconv layers` as a table, or that it was not taken yet.

    The rows in which no rung runs are folded below it: a click shows them.
    """
    if not path.exists():
        return _not_taken("layers")
    of = comparison.load_layers(path)
    made_on = f"*Medians on {of.made['gpu']}, torch {of.made['torch']}, {of.made['date']}.*"
    rows = list(tables.layer_rows(of))
    kernel_ = tables.LAYER_HEADERS.index("kernel")
    ours = table(tables.LAYER_HEADERS, [r for r in rows if r[kernel_] != tables.PYTORCHS])
    theirs = [r for r in rows if r[kernel_] == tables.PYTORCHS]
    text = f"{ours.data}\n\n{made_on}"
    if theirs:
        ratios = [row.ratio for row in of.rows if not row.runs]
        summary = (
            f"{len(theirs)} rows in which PyTorch's own runs on both sides: "
            f"× from {min(ratios):.2f} to {max(ratios):.2f}"
        )
        folded = table(tables.LAYER_HEADERS, theirs).data
        text += f"\n\n<details><summary>{summary}</summary>\n\n{folded}\n\n</details>"
    return Markdown(text)


def calls(path: Path = comparison.LAYERS_RECORD) -> Markdown:
    """Host time of calls on tiny layers, from the same record, or that it was not taken yet."""
    if not path.exists():
        return _not_taken("layers")
    overheads = comparison.load_layers(path).overheads
    rows = [(o.what, f"{o.theirs:.1f}", f"{o.ours:.1f}") for o in overheads]
    return table(("µs a call", comparison.THEIRS, comparison.OURS), rows)


def network(path: Path = comparison.NETWORK_RECORD) -> Markdown:
    """The record of `asymconv network` as a table, or that it was not taken yet."""
    if not path.exists():
        return _not_taken("network")
    of = comparison.load_network(path)
    shape = "×".join(str(size) for size in of.input_shape)
    rows = table(tables.NETWORK_HEADERS, tables.network_rows(of))
    return Markdown(f"{rows.data}\n\n*{shape}, {of.made['gpu']}, {of.made['date']}.*")


def writes(shape: ConvShape) -> Markdown:
    """What the ways to write of `asymconv.strips` cost on a shape, counted on the CPU.

    Whole sectors are those that the outputs fill, 8 floats each; a way that touches more of them
    writes some in parts.
    """
    rows = []
    for variant in moves.STRIPS.variants:
        constants = moves.STRIPS.constants(variant)
        if constants["STORE"] == moves.NOTHING or not constants["LOAD"]:
            continue
        if constants["EVICT_LOADS"] or constants["EVICT_STORES"]:
            continue
        lines = build.load(moves.STRIPS, "cpu-traced", defines=variant).trace(
            *random_data(shape, seed=0), shape
        )
        stores = [line for line in lines if (line.space, line.op) == ("global", "store")]
        touched = sum(line.sectors for line in stores) / (shape.outputs / 8)
        requests = sum(line.requests for line in stores)
        rows.append((moves.describe(variant), f"{requests:,}", f"{touched:.2f}"))
    return table((f"{shape}", "requests", "sectors touched, of whole ones"), rows)


def changes(path: Path = ablations.RECORD) -> Picture | Markdown:
    """The record of `asymconv ablations` as a figure, or that it was not taken yet."""
    return figure(plots.changes(record.load(path))) if path.exists() else _not_taken("ablations")


def writing(path: Path = moves.RECORD) -> Picture | Markdown:
    """The record of `asymconv strips` as a figure, or that it was not taken yet."""
    return figure(plots.writing(record.load(path))) if path.exists() else _not_taken("strips")


def errors(of: accuracy.Accuracy, names: Sequence[str]) -> Markdown:
    """Errors of some methods of a record, and where each was computed."""
    chosen = [of[name] for name in names]
    rows = [(m.name, m.kind, m.where, f"{m.error:.2e}") for m in chosen]
    return table(("method", "what it is", "computed on", "‖y − ref‖ / ‖ref‖"), rows, texts=3)


def ranges(of: accuracy.Accuracy, names: Sequence[str]) -> Markdown:
    """Methods on hard inputs: the largest error over the sum of the terms' magnitudes.

    "wrong": infinite or NaN where the reference is not, or the other way round.
    """
    rows = []
    for case, measured in of.ranges.items():
        full = {record.short_name(name): worst for name, worst in measured.items()} | measured
        values = [full[name] for name in names]
        rows.append(
            (case, *("**wrong**" if v is None else f"{v:.0e}" if v else "0" for v in values))
        )
    return table(("input", *names), rows)


def _not_taken(command: str) -> Markdown:
    return Markdown(f"*Not measured yet: `asymconv {command} --record` does it on a GPU.*")


def decisions(capability: tuple[int, int], *layers: tuple[ConvShape, str, bool]) -> Markdown:
    """What would run float32 layers on a GPU of this capability, and why.

    Args:
        capability: the GPU's.
        layers: a shape, a layout ("NCHW", "channels_last"), and whether TF32 is allowed.
    """
    rows = []
    for shape, layout, tf32 in layers:
        facts = dispatch.Facts(
            *("cuda", capability, torch.float32, layout, tf32),
            *(shape.input_shape, shape.weight_shape, None),
            *(shape.stride, shape.padding, shape.dilation, shape.groups),
        )
        decision = dispatch.decide(facts)
        runs = decision.rung.number if decision.rung else tables.PYTORCHS
        flags = "allowed" if tf32 else "forbidden"
        rows.append((f"{shape}, {layout}, TF32 {flags}", runs, decision.reason))
    return table(("layer", "runs", "because"), rows, texts=3)


def _series(name: str, path: Path | None) -> tuple[experiments.Series, experiments.Measured | None]:
    """A series and what was measured of it, None if nothing."""
    path = path or experiments.RECORD
    found = experiments.load(path) if path.exists() else {}
    return experiments.get_series(name), found.get(name)


def series(name: str, path: Path | None = None) -> Markdown:
    """A series of `asymmetry` as a table, or that it was not taken yet: asks, holds equal, found.

    Raises:
        KeyError: there is no such series.
    """
    its, measured = _series(name, path)
    text = f"**{its.question}** Equal: {its.equal}\n\n"
    if measured is None:
        return Markdown(text + _not_taken("asymmetry").data)
    rows = table(tables.asymmetry_headers(its), tables.asymmetry_rows(its, measured))
    made_on = f"*Medians on {measured.made['gpu']}, {measured.made['date']}.*"
    if set(measured.relative(its)) & set(experiments.SLOW):
        slow = " and ".join(experiments.SLOW)
        made_on += f" *{slow} with {experiments.SLOW_FILTERS} output channels.*"
    out = {f"{n}, {row.shape}: {why}" for row in measured.rows for n, why in row.left_out.items()}
    lines = "".join(f"\n- not measured: {line}" for line in sorted(out))
    return Markdown(f"{text}{rows.data}\n\n{made_on}\n{lines}")


def series_figure(name: str, path: Path | None = None) -> Picture | Markdown:
    """The same as a figure, where it was taken.

    Raises:
        KeyError: there is no such series.
    """
    its, measured = _series(name, path)
    if measured is None:
        return Markdown("*And its figure.*")
    return figure(plots.series(measured, its))


def answers(path: Path | None = None) -> Markdown:
    """Every idea of the seed: its verdict, and the number from the records that gives it."""
    path = path or experiments.RECORD
    found = hints.answers(
        record.load(record.LADDER),
        record.load(record.VARIANTS),
        profiler.load(),
        experiments.load(path) if path.exists() else None,
    )
    rows = [(a.idea, f"**{a.verdict}**", a.number, a.record) for a in found]
    return table(("idea", "verdict", "number", "record"), rows, texts=4)


def sectors_by_hand(rung: Rung, shapes: Sequence[ConvShape]) -> Markdown:
    """Sectors of k03's stores and loads of x, by `predictions` and counted on the CPU."""
    rows = []
    for shape in shapes:
        lines = [line for line in trace(rung, shape) if line.space == "global"]
        stores = sum(line.sectors for line in lines if line.op == "store")
        requests = predictions.store_requests(shape)
        loads = sum(line.sectors for line in lines if line.op == "load") - requests * shape.terms
        rows.append(
            (
                f"{shape.width} in, {shape.out_width} out",
                f"{100 * predictions.aligned_rows(shape.out_width):.3g} %",
                f"{predictions.store_sectors(shape):,}",
                f"{stores:,}",
                f"{stores / requests:.2f}",
                f"{predictions.load_sectors(shape):,}",
                f"{loads:,}",
            )
        )
    headers = ("columns", "rows on a sector", "store sectors by hand", "counted", "a request")
    return table((*headers, "load sectors by hand", "counted"), rows)


def per_output(rungs: Sequence[Rung], shapes: Sequence[ConvShape]) -> Markdown:
    """Sectors of global memory that each rung asks for, for an output, counted on the CPU."""
    rows = []
    for rung in rungs:
        cells = []
        for shape in shapes:
            lines = [line for line in trace(rung, shape) if line.space == "global"]
            cells.append(f"{sum(line.sectors for line in lines) / shape.outputs:.2f}")
        rows.append((rung.number, *cells))
    return table(("rung", *(f"{s.height}×{s.width}" for s in shapes)), rows)


def strips(shapes: Sequence[ConvShape], multiprocessors: int = 132) -> Markdown:
    """k07's plan for each shape, and what it costs by hand (`predictions.strips`)."""
    base = predictions.strips(shapes[0], multiprocessors)
    rows = []
    for shape in shapes:
        plan = predictions.strips(shape, multiprocessors)
        waste = predictions.covered(shape, (1, 128)) - 1
        rows.append(
            (
                f"{shape.batch}×{shape.height}×{shape.width}",
                plan.strips,
                f"{100 * waste:.1f} %",
                f"{plan.items} of {plan.rows} rows",
                plan.turns,
                f"{plan.cost:.2f}",
                f"{plan.cost / base.cost:.2f}",
            )
        )
    turns = f"turns of {multiprocessors}"
    headers = ("input", "strips", "columns in vain", "items", turns, "cost")
    return table((*headers, "× the first"), rows)
