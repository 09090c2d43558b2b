"""The `asymconv` command: run the study, measure on a GPU, say what this machine can do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from asymconv.kernels import Rung
    from asymconv.problem import ConvShape
    from asymconv.record import Record

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(markup=False)  # in brackets stand extras to install, and shapes

RungNames = Annotated[str, typer.Option(help="Rungs by number, with commas; all unless told.")]
WriteRecord = Annotated[bool, typer.Option("--record", help="Write a record.")]
RecordPath = Annotated[
    Path | None, typer.Option(help="Where to write the record, if not under figures/data/.")
]

# Modules that not every command needs are imported in the commands.


def _fail(message: str) -> typer.Exit:
    console.print(message, style="red", soft_wrap=True)
    return typer.Exit(1)


def _need_gpu(command: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise _fail(f"{command} needs a GPU and finds none; `asymconv info` says what is missing")


def _only_elsewhere(option: str, output: Path | None) -> None:
    """A part must not take the place of the published whole."""
    if output is None:
        message = f"is needed to record a part ({option}): the whole record would be lost"
        raise typer.BadParameter(message, param_hint="--output")


def _rungs(names: str) -> Sequence[Rung]:
    """The rungs named with commas, or all."""
    from asymconv.kernels import RUNGS, get_rung

    try:
        return [get_rung(name.strip()) for name in names.split(",")] if names else RUNGS
    except KeyError as error:
        raise _fail(error.args[0]) from error


@app.command()
def info() -> None:
    """Say what this machine can do, and what is missing with the command that mends it."""
    from asymconv import machine

    table = Table("what", "here", "without it", title="asymconv on this machine")
    for part in machine.survey():
        table.add_row(part.what, part.found, "" if part.there else part.mend)
    console.print(table)
    console.print(machine.summary())


def _numbers(text: str, option: str, counts: Sequence[int], what: str) -> tuple[int, ...]:
    """Whole numbers with commas between them. Raises typer.BadParameter, naming the option."""
    parts = text.split(",")
    if len(parts) not in counts or not all(part.strip().lstrip("-").isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not {what}", param_hint=option)
    return tuple(int(part) for part in parts)


def _pair(text: str, option: str) -> tuple[int, int]:
    """(height, width) of an option: one number for both, or two. Raises typer.BadParameter."""
    numbers = _numbers(text, option, (1, 2), "a whole number, or two: height,width")
    return numbers[0], numbers[-1]


def _print_taken(shape: ConvShape, capability: tuple[int, int], gpu: str) -> None:
    """Say which rung `ModelNew` takes for float32 NCHW tensors, under either flag, and why."""
    import torch

    from asymconv.dispatch import Facts, decide

    sizes = (shape.input_shape, shape.weight_shape, (shape.out_channels,) if shape.bias else None)
    pairs = (shape.stride, shape.padding, shape.dilation, shape.groups)
    for tf32 in (True, False):
        facts = Facts("cuda", capability, torch.float32, "NCHW", tf32, *sizes, *pairs)
        rung, reason, *_ = decide(facts)
        flags = "allowed" if tf32 else "forbidden"
        name = rung.name if rung else "PyTorch's own convolution"
        console.print(f"ModelNew on {gpu}, TF32 {flags}: {name} ({reason})", soft_wrap=True)


def _print_untimed(shape: ConvShape, rungs: Sequence[Rung]) -> None:
    """What can be said of a convolution without a GPU, by the published record's ceilings."""
    from asymconv import record, tables

    published = record.load(record.LADDER)
    gflop, gbytes = shape.flops / 1e9, shape.least_bytes / 1e9
    console.print(
        f"{shape}: {gflop:,.4g} GFLOP on at least {gbytes:,.3g} GB, "
        f"{shape.intensity:.3g} FLOP/byte",
        soft_wrap=True,
    )
    console.print(tables.floors_rich(published, shape))
    table = Table("rung", "takes this shape", title="The ladder, not timed")
    for rung in rungs:
        table.add_row(rung.name, rung.refuses(shape) or "yes")
    console.print(table)
    _print_taken(shape, (9, 0), "an H100")


def _draw_roofline(result: Record, source: str, path: Path) -> None:
    """Write the roofline of a run just made as SVG; `source` is what its record is called."""
    from asymconv.record import write_atomically

    try:
        from asymconv import plots
    except ImportError as error:
        console.print(f"no drawing: {error}; pip install 'asymconv[study]'", soft_wrap=True)
        return
    write_atomically(path, plots.svg(plots.roofline(result, source=source)))
    console.print(f"roofline: {path}", soft_wrap=True)


@app.command()
def bench(
    rungs: RungNames = "",
    shape: Annotated[
        str, typer.Option(metavar="N,C,H,W", help="Another layer's input; needs --out-channels.")
    ] = "",
    out_channels: Annotated[int, typer.Option(help="Of that layer.")] = 0,
    kernel: Annotated[str, typer.Option(help="Height,width, or one number for both.")] = "3",
    stride: Annotated[str, typer.Option(help="Likewise.")] = "1",
    padding: Annotated[str, typer.Option(help="Likewise.")] = "0",
    dilation: Annotated[str, typer.Option(help="Likewise.")] = "1",
    groups: Annotated[int, typer.Option(help="Of channels.")] = 1,
    bias: Annotated[bool, typer.Option("--bias", help="With a bias.")] = False,
    roofline: Annotated[
        Path | None,
        typer.Option(help="Where to draw the roofline as SVG; roofline.svg with --shape."),
    ] = None,
    record: WriteRecord = False,
    output: RecordPath = None,
) -> None:
    """Check and time the ladder against nn.Conv2d and the ceilings on this GPU.

    On the contract's convolution, or on a layer of your own: --shape 8,64,512,1024
    --out-channels 128 --kernel 3. Says which rung ModelNew takes. Other ways to have PyTorch
    compute it are timed, too; torch.compile, which takes long, for a record only.
    """
    import torch

    from asymconv import measure, tables
    from asymconv import record as records
    from asymconv.problem import CONTRACT, ConvShape

    if shape:
        sizes = _numbers(shape, "--shape", (4,), "four whole numbers N,C,H,W")
        if min(sizes) < 1:
            raise typer.BadParameter(f"{shape!r} has a size below 1", param_hint="--shape")
        if not out_channels:
            raise typer.BadParameter("is needed with --shape", param_hint="--out-channels")
        pairs = {"--kernel": kernel, "--stride": stride, "--padding": padding}
        pairs["--dilation"] = dilation
        pairs = [_pair(text, option) for option, text in pairs.items()]
        try:
            layer = ConvShape(*sizes, out_channels, *pairs, groups, bias)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        roofline = roofline or Path("roofline.svg")
    elif (out_channels, kernel, stride, padding, dilation, groups, bias) != (
        *(0, "3", "1", "0", "1", 1, False),
    ):
        raise typer.BadParameter("is needed to describe a layer", param_hint="--shape")
    else:
        layer = CONTRACT
    if record and layer != CONTRACT and output is None:
        raise typer.BadParameter("is needed to record another layer", param_hint="--output")
    if record and rungs:
        _only_elsewhere("--rungs", output)
    chosen = _rungs(rungs)
    if not torch.cuda.is_available():
        _print_untimed(layer, chosen)
        if not record:
            console.print("Not timed: no GPU is here; `asymconv info` says what is missing")
            return
    _need_gpu("a record")
    with console.status("checking, then timing"):
        try:
            peers = measure.ALL_PEERS
            if not record:
                peers = tuple(peer for peer in peers if peer not in measure.COMPILED)
            result = records.measure_ladder(layer, chosen, peers)
        except (AssertionError, RuntimeError) as error:  # wrong, or out of memory
            raise _fail(f"{layer}: {error}") from error
    console.print(tables.ladder_rich(result))
    console.print(tables.floors_rich(result))
    for name, reason in result.left_out.items():
        console.print(f"{name} is not in the table: {reason}", soft_wrap=True)
    _print_taken(layer, torch.cuda.get_device_capability(), result.gpu)
    if roofline:
        _draw_roofline(result, output.name if record and output else "(not saved)", roofline)
    if record:
        path = output or records.LADDER
        result.save(path)
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def sweep(
    rungs: RungNames = "",
    record: WriteRecord = False,
    output: RecordPath = None,
) -> None:
    """Check and time rungs with other tile constants, two of the contract's images."""
    from asymconv import measure
    from asymconv import record as records
    from asymconv.problem import CONTRACT

    if record and rungs:
        _only_elsewhere("--rungs", output)
    _need_gpu("sweep")
    shape = CONTRACT.with_(batch=2)
    with console.status("building, checking, timing"):
        timings = measure.check_and_sweep(shape, _rungs(rungs), measure.PEERS)
    table = Table("rung", "constants", "ms")
    for timing in timings:
        constants = " ".join(f"{k}={v}" for k, v in timing.defines.items())
        table.add_row(timing.name, constants, f"{timing.median:.3f}")
    console.print(table)
    if record:
        path = output or records.VARIANTS
        records.make("Variants, two images", shape, timings, {}).save(path)
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def strips(record: WriteRecord = False, output: RecordPath = None) -> None:
    """Time k07's bytes in k07's strips without its products, written in many ways."""
    from asymconv import strips as experiment
    from asymconv.kernels import RUNGS

    _need_gpu("strips")
    with console.status("building, verifying, timing"):
        result = experiment.measure_strips([r for r in RUNGS if r.arch == "90a"])
    table = Table("what", "ms", "GB/s", *experiment.STRIPS.defines)
    for timing in result.timings:
        constants = experiment.STRIPS.defines | timing.defines
        is_move = timing.name in experiment.SHAPES
        values = [str(value) for value in constants.values()] if is_move else []
        table.add_row(timing.name, f"{timing.median:.3f}", f"{timing.gbytes:,.0f}", *values)
    console.print(table)
    if record:
        path = output or experiment.RECORD
        result.save(path)
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def ablations(record: WriteRecord = False, output: RecordPath = None) -> None:
    """Time k07 with parts left out, other paces and what else was tried in it."""
    from asymconv import ablations as experiment

    _need_gpu("ablations")
    with console.status("building, checking, timing"):
        result = experiment.measure_ablations()
    table = Table("k07 with", "ms from rest", "warm")
    for timing in result.timings:
        if not timing.name.endswith((experiment.WARM, experiment.LONG)):
            warm = result[timing.name + experiment.WARM].median
            table.add_row(timing.name, f"{timing.median:.3f}", f"{warm:.3f}")
    console.print(table)
    if record:
        path = output or experiment.RECORD
        result.save(path)
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def accuracy(record: WriteRecord = False, output: RecordPath = None) -> None:
    """Compare models of rounding, rungs and, on a GPU, PyTorch's own with float64."""
    import torch

    from asymconv import accuracy as errors

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = output or errors.RECORD
    if record and device == "cpu" and path.exists() and errors.load(path).made["device"] != "CPU":
        raise _fail(f"{path} holds errors of a GPU, which would be lost: give another --output")
    with console.status("computing") as status:
        result = errors.measure(device, say=status.update)
    table = Table("method", "on", "‖y − ref‖ / ‖ref‖", title=f"Errors on {result.shape}")
    for method in result.errors:
        table.add_row(method.name, method.where, f"{method.error:.2e}")
    console.print(table)
    if record:
        result.save(path)
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def profile(
    rungs: RungNames = "",
    also: Annotated[
        list[str], typer.Option(help="A variant as well, e.g. k04:TILE_H=4,TILE_W=64; repeatable.")
    ] = [],  # noqa: B006 (typer's way)
    record: WriteRecord = False,
    output: RecordPath = None,
) -> None:
    """Take the rungs' hardware counters with Nsight Compute: contract's shape, and a small one."""
    from asymconv import profiler
    from asymconv import record as records
    from asymconv.problem import CONTRACT

    _need_gpu("profile")
    jobs = [(rung, shape, {}) for rung in _rungs(rungs) for shape in (CONTRACT, profiler.PROOF)]
    for text in also:
        name, _, constants = text.partition(":")
        if not re.fullmatch(r"(\w+=\d+)(,\w+=\d+)*", constants):
            message = f"{text!r} is not a rung and constants like k04:TILE_H=4,TILE_W=64"
            raise typer.BadParameter(message, param_hint="--also")
        defines = {k: int(v) for k, v in (c.split("=") for c in constants.split(","))}
        jobs.append((_rungs(name)[0], CONTRACT, defines))
    taken, path = [], output or profiler.COUNTERS
    before = profiler.load(path) if path.exists() else None
    for rung, shape, defines in jobs:
        with console.status(f"profiling {rung.name}"):
            try:
                taken.append(profiler.profile(rung, shape, defines))
            except profiler.ProfilerError as error:
                raise _fail(str(error)) from error
        if record:  # after each: a run that is cut off has lost nothing
            result = profiler.Profile(records.environment(), tuple(taken))
            (before.joined(result) if before else result).save(path)
    full = [c for c in taken if c.shape == CONTRACT]
    table = Table("counter", *(records.short_name(c.name) for c in full))
    for name in profiler.METRICS:
        table.add_row(name, *(f"{c[name]:,.4g}" for c in full))
    console.print(table)
    if record:
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def layers(
    only: Annotated[str, typer.Option(help="Layers whose names have this, all unless told.")] = "",
    record: WriteRecord = False,
    output: RecordPath = None,
) -> None:
    """Compare nn.Conv2d with asymconv.Conv2d on layers of real networks, on this GPU."""
    from asymconv import comparison, tables
    from asymconv.real_layers import LAYERS

    if record and only:
        _only_elsewhere("--only", output)
    _need_gpu("layers")
    chosen = [layer for layer in LAYERS if only.lower() in f"{layer.data}, {layer.network}".lower()]
    if not chosen:
        raise _fail(f"no layer has {only!r} in its name")
    path = output or comparison.LAYERS_RECORD
    done = None
    with console.status("building, comparing, timing") as status:
        # saved after each: a run that is cut off has lost nothing
        for done in comparison.measure_layers(chosen, path=path if record else None):
            last = done.rows[-1]
            status.update(f"{len(done.rows)} rows, last {last.network}, {last.shape}")
    console.print(tables.layers_rich(done))
    for rung, (built, loaded) in done.first_use.items():
        console.print(f"{rung}: built in {built:.1f} s, loaded from the cache in {loaded:.3f} s")
    for call in done.overheads:
        console.print(f"{call.what}: {call.theirs:.1f} µs, ours {call.ours:.1f} µs a call")
    if record:
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def network(
    batch: Annotated[int, typer.Option(help="Images of 512×1024.")] = 8,
    record: WriteRecord = False,
    output: RecordPath = None,
) -> None:
    """Compare the network of notebook 09 before and after asymconv.convert, on this GPU."""
    from asymconv import comparison, tables

    _need_gpu("network")
    with console.status("comparing, training, timing"):
        make = comparison.notebook_network()
        result = comparison.compare_network(make, (batch, 3, 512, 1024), "cuda")
    table = Table(*tables.NETWORK_HEADERS, title="The network of notebook 09")
    for row in tables.network_rows(result):
        table.add_row(*row)
    console.print(table)
    for name, line in result.explained.items():
        console.print(f"{name}: {line}", soft_wrap=True)
    if record:
        path = output or comparison.NETWORK_RECORD
        result.save(path)
        console.print(f"record: {path}", soft_wrap=True)


@app.command(name="record")
def record_all(
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to, if not figures/data/.")
    ] = None,
    only: Annotated[str, typer.Option(help="Commands with commas, all unless told.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds that one of them may take.")] = 1800.0,
) -> None:
    """Take anew each record that a command makes: bench, sweep and so on, each with --record."""
    from asymconv import retake
    from asymconv.record import DATA_FOLDER

    _need_gpu("record")
    names = [name.strip() for name in only.split(",")] if only else ()
    try:
        failed = retake.retake(output or DATA_FOLDER, names, limit=limit, say=console.print)
    except KeyError as error:
        raise _fail(error.args[0]) from error
    if failed:
        raise _fail(f"failed: {', '.join(failed)}")


@app.command()
def asymmetry(
    only: Annotated[str, typer.Option(help="Series by name, with commas; all unless told.")] = "",
    budget: Annotated[
        float, typer.Option(help="Seconds; what would end later by estimate is not begun.")
    ] = 0,
    record: WriteRecord = False,
    output: RecordPath = None,
) -> None:
    """Check and time rungs and peers on shapes of every kind on this GPU (notebook 08).

    Prints the series with a guess at their times first.
    """
    import math

    from asymconv import asymmetry as experiments
    from asymconv import tables

    try:
        names = [name.strip() for name in only.split(",")] if only else []
        chosen = [experiments.get_series(name) for name in names] or experiments.SERIES
    except KeyError as error:
        raise _fail(error.args[0]) from error
    console.print(tables.series_rich(chosen))
    _need_gpu("asymmetry")
    path = output or experiments.RECORD
    done: dict[str, list[experiments.Row]] = {series.name: [] for series in chosen}
    with console.status("building, checking, timing") as status:
        # saved after each shape: a run that is cut off has lost nothing
        for series, row in experiments.measure(
            chosen, path=path if record else None, budget=budget or math.inf
        ):
            done[series.name].append(row)
            status.update(f"{series.name}: {row.shape}")
    for series in chosen:
        rows = done[series.name]
        if not rows:
            console.print(f"{series.name}: nothing measured within {budget:g} s", soft_wrap=True)
            continue
        measured = experiments.Measured({}, tuple(rows))
        console.print(tables.asymmetry_rich(series, measured))
        for row in rows:
            for name, reason in row.left_out.items():
                console.print(f"{name}, {row.shape}: {reason}", soft_wrap=True)
    if record:
        console.print(f"record: {path}", soft_wrap=True)


@app.command()
def figures(
    folder: Annotated[Path, typer.Option(help="Where to write the SVG files.")] = Path("figures"),
) -> None:
    """Redraw every figure and the README's table from the records."""
    from asymconv import study

    readme = study.ROOT / "README.md" if folder.resolve() == study.ROOT / "figures" else None
    for path in study.redraw(folder, readme):
        console.print(f"wrote {path}", soft_wrap=True)


@app.command()
def study(
    output: Annotated[
        Path, typer.Option(help="Where the executed notebooks and figures go.")
    ] = Path("study-output"),
    only: Annotated[str, typer.Option(help="Notebooks to run, e.g. 00,01; all unless told.")] = "",
    html: Annotated[
        bool, typer.Option("--html", help="Write them as linked HTML pages too.")
    ] = False,
) -> None:
    """Run every notebook headless, draw the figures, and print the ladder."""
    from asymconv import study as studies

    try:
        studies.run(output, only.split(",") if only else None, console, html=html)
    except studies.StudyError as error:
        raise _fail(str(error)) from error


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("model_new.py"),
    rung: Annotated[
        str, typer.Option(help="Rungs by number, with commas; the first that takes a call runs it.")
    ] = "k07,k06",
) -> None:
    """Write the layer as one Python file that needs PyTorch and nvcc, and not this package."""
    from asymconv import export as exports

    try:
        exports.write(output, _rungs(rung))
    except (exports.ExportError, OSError) as error:
        raise _fail(str(error)) from error
    console.print(f"wrote {output}", soft_wrap=True)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
