"""The notebooks were run, are in canonical form, and run headless through papermill.

Whether their outputs still come out is nbval's test: pytest collects notebooks/ with it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console
from samples import claims_of_runs

from asymconv import (
    ablations,
    asymmetry,
    comparison,
    measure,
    predictions,
    profiler,
    record,
    study,
)
from asymconv.kernels import RUNGS, get_rung
from asymconv.problem import CONTRACT

nbformat = pytest.importorskip("nbformat", reason="no Jupyter on this machine")

PATHS = study.notebooks()
IDS = [p.stem for p in PATHS]
AGAIN = "ladder_again.json"


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_was_run_from_top_to_bottom_without_errors(path: Path) -> None:
    """nbval passes a notebook that was never run: it has no outputs to compare."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert code
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not [o for o in cell.outputs if o.output_type == "error"]
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], cell.source


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_is_in_canonical_form(path: Path) -> None:
    """As nbstripout leaves it when outputs and counts are kept: no times, no machine's names."""
    keys = "metadata.papermill cell.metadata.papermill cell.metadata.execution"
    command = [sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count"]
    command += ["--extra-keys", keys, "--textconv", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == path.read_text()
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert metadata["language_info"] == {"name": "python"}


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_pastes_nothing(path: Path) -> None:
    """Kernels and helpers come from the package; a notebook defines neither.

    A cell with the tag "network" may define what its reader would bring along: a torch.nn network.
    """
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            network = "network" in cell.metadata.get("tags", ())
            for word in ("__global__", "load_inline", *(() if network else ("def ", "class "))):
                assert word not in cell.source, f"{path.name}: {cell.source}"
            assert len(cell.source.splitlines()) <= 16, f"{path.name}: a long cell"


def test_every_rung_has_its_notebook_that_shows_and_checks_it() -> None:
    for rung in RUNGS:
        text = (study.NOTEBOOKS / f"{rung.notebook}.ipynb").read_text()
        assert rung.number in text


def words_of_00_to_07() -> dict[str, str]:
    """Sentences with numbers, as the records give them."""
    ladder, strips = record.load(), record.load(record.DATA_FOLDER / "strips.json")
    ours, theirs = ladder["k07"].median, ladder["nn.Conv2d"].median
    strict = ladder["nn.Conv2d, strict fp32"].median
    floor, k08 = ladder["memory floor"].median, ladder["k08"].median
    # whole sectors by bulk copies; with and without the one in which a row ends
    ways = {t.defines.get("COMPLETE", 0): t for t in strips.timings if t.name == "strips"
            and t.defines.get("STORE") == 3 and t.defines.get("ALIGN") == 8
            and set(t.defines) <= {"STORE", "ALIGN", "COMPLETE"}}  # fmt: skip
    part, whole = ways[0].median, ways[1].median
    as_they_lie = {"STORE": 1, "ALIGN": 2}
    (slow,) = (t.median for t in strips.timings if (t.name, t.defines) == ("strips", as_they_lie))
    copied = 100 * ladder.shape.least_bytes / floor / 1e6 / predictions.H100_PEAK
    pace, clock = get_rung("k07").defines["PACE"], predictions.clocked_ms(CONTRACT)
    counters = profiler.load()["k07"]
    dram_gb = (counters["dram_read_bytes"] + counters["dram_write_bytes"]) / 1e9
    written = profiler.load()["k08"]["dram_write_bytes"] / 1e9
    output = 4 * ladder.shape.outputs / 1e9
    assert 0 <= written / output - 1 <= 0.03
    faster = theirs / ours
    assert ours <= 1.3
    assert k08 <= 2.8
    assert faster >= 3.2
    again = record.load(record.DATA_FOLDER / AGAIN)
    assert again["k08"].median <= 2.8
    errors = [of["k07"].error / of["nn.Conv2d"].error for of in (ladder, again)]
    assert all(abs(ratio - 1) <= 0.003 for ratio in errors), "k07 errs like cuDNN"
    later, later_faster = again["k07"].median, again["nn.Conv2d"].median / again["k07"].median
    assert abs(later / ours - 1) <= 0.01, "k07 is steady"
    first, second = (datetime.strptime(of.made["date"], "%Y-%m-%d %H:%M UTC")
                     for of in (ladder, again))  # fmt: skip
    minutes = round((second - first).total_seconds() / 600) * 10
    moved_by = {t.name: 100 * abs(again[t.name].median / t.median - 1) for t in ladder.timings}
    moving, bounds = ["k08_hopper_split", "cudnn.benchmark"], ("matmul", "L2 read")
    assert all(by <= 1 or name.startswith((*bounds, *moving)) for name, by in moved_by.items())
    moves = [f"{moved_by[name]:.0f}" for name in moving]
    pitch = asymmetry.get_series("pitch")
    k08s = asymmetry.load()["pitch"].relative(pitch)["k08"]
    pairs = 100 * max(k08s[i] - 1 for i, shape in enumerate(pitch.shapes) if shape.out_width % 2)
    channels_last = ladder["channels_last"].median
    k04 = [t for t in record.load(record.VARIANTS).timings if t.name.startswith("k04")]
    tiles = {(t.defines["TILE_H"], t.defines["TILE_W"]): t.median for t in k04}
    wide = [100 * (tiles[w, h] / tiles[h, w] - 1) for h, w in ((8, 32), (16, 32))]
    behind = 100 * (tiles[8, 32] / min(tiles.values()) - 1)
    tf32 = ladder.shape.flops / ladder["matmul tf32"].tflops / 1e9
    threes = [3 * predictions.floor_ms(of.shape.flops, of["matmul fp16"]) for of in (ladder, again)]
    direct = f"{min(threes):.1f} to {max(threes):.1f} ms"
    return {
        f"PyTorch's default needs {theirs / floor:.1f} times what the memory needs": "00_problem",
        f"at {strict / theirs:.1f} times the time": "00_problem",
        f"in TF32 too ({tf32:.1f} ms)": "00_problem",
        f"worth at this rung: {min(wide):.0f} to {max(wide):.0f} %": "03_shared_memory",
        f"8 × 32, is {behind:.0f} % behind": "03_shared_memory",
        f"it takes {channels_last:.1f} ms in the same run": "05_tensor_cores",
        f"{part:.2f} ms become {whole:.2f}": "06_hopper",
        f"{ours:.2f} ms, {ours / floor:.2f} times the memory's own time": "06_hopper",
        f"{faster:.2f} times nn.Conv2d's speed": "06_hopper",
        f"measured twice, {minutes} minutes apart": "06_hopper",
        f"k07 takes {later:.2f} ms there too, {later_faster:.2f} times": "06_hopper",
        f"k08 moves by {moves[0]} % and `cudnn.benchmark` by {moves[1]}, all other rungs and peers "
        "by less than 1": "06_hopper",
        **dict.fromkeys(words_of_changes(), "06_hopper"),
        f"asks for {pace} % of its peak, a plain copy reaches {copied:.0f}": "06_hopper",
        f"{slow / part:.1f} times as fast as sums written as they lie": "06_hopper",
        f"peak, with 15 µs until weights are there, **{clock:.2f} ms**": "06_hopper",
        **dict.fromkeys(words_of_k08s_power(), "07_precision"),
        f"{dram_gb:.2f} GB, where 3.21 would be ideal": "06_hopper",
        f"takes {strict:.1f} ms in place of {theirs:.1f}": "07_precision",
        f"{strict / k08:.1f} times as fast as its strict fp32": "07_precision",
        f"It takes {k08:.2f}.": "07_precision",
        f"it differs from run to run, {direct} in our records": "07_precision",
        f"Three for one take {direct} at the rate that cuBLAS keeps up": "07_precision",
        f"k08 takes {k08:.2f} in this run": "07_precision",
        f"By pairs they take {pairs:.0f} % more than the contract's": "07_precision",
        f"{written:.3f} GB written (counters.json), the output is {output:.3f}": "07_precision",
    }


def words_of_changes() -> list[str]:
    """What notebook 06 says of `asymconv ablations`."""
    found, strips = record.load(ablations.RECORD), record.load(record.DATA_FOLDER / "strips.json")
    warm, long = ablations.WARM, ablations.LONG

    def ms(name: str) -> str:
        return f"{found[name].median:.2f}"

    def span(names: Iterable[str]) -> set[str]:
        return {ms(name) for name in names}

    def drawn(name: str) -> tuple[str, str]:
        watts, mhz = found.made[f"W and MHz of {name}{long}"].split(", ")
        return f"{float(watts):.0f} W", f"{mhz} MHz"

    def copies(**defines: int) -> str:
        defines = {"STORE": 3, "ALIGN": 8, "COMPLETE": 1, **defines}
        (one,) = (t for t in strips.timings if t.name == "strips" and t.defines == defines)
        return f"{one.median:.2f}"

    def free(name: str) -> str:
        return ms(f"{name}, no clock")

    tried = [a.name for a in ablations.ABLATIONS if a.group == "tried"]
    assert all(abs(found[n].median / found["k07"].median - 1) <= 0.01 for n in tried)
    steady = [n for n in tried if n not in ("one row ahead", "no turns")]
    assert all(found[n + warm].median / found[n].median - 1 <= 0.01 for n in (*steady, "k07"))
    watts, mhz = drawn("k07")
    pace, turns = "% of memory's peak", "a turn until products are issued"
    cycles = 2 * 36 * 68  # of a row's products: two warpgroups' wgmma

    def us(name: str) -> str:
        return f"{cycles / float(drawn(name)[1].split()[0]):.1f}"

    unclocked = [found[f"{n}no clock"].median for n in ("neither loads nor stores, ", "")]
    assert abs(unclocked[0] / unclocked[1] - 2 / 3) <= 0.05  # "in two thirds of the time"
    best, issued, none = (found[n + long].median for n in ("k07", turns, "no turns"))
    assert issued - best >= 0.5 * (none - best) > 0  # "most of what turns save is lost"

    return [
        f"Without products k07 takes {ms('no products')} ms, as with them",
        f"beside {ms('no clock')} for everything: without products {free('no products')}, without "
        f"conversion {free('no conversion')}, without both "
        f"{free('neither products nor conversion')}; without loads {free('no loads')}, without "
        f"stores {free('no stores')}, without both {free('neither loads nor stores')}",
        f"k07 takes {ms('no clock')} ms, and {ms('no clock, parts of 128 rows')} in parts of 128 "
        f"rows; with it {ms('k07')}",
        f"{ms(f'76 {pace}')} at 76 % of memory's peak, {ms(f'74 {pace}')} at 74, "
        f"{ms(f'70 {pace}')} at 70",
        f"{ms(f'79 {pace}')} at 79 and {ms(f'80 {pace}')} at 80; at 83 it is as if there were none "
        f"({ms(f'83 {pace}')})",
        f"80 % takes {ms(f'80 {pace}{warm}')} there, and up to "
        f"{max(found[f'80 {pace}{warm}'].milliseconds):.2f}",
        f"takes {ms('one row ahead')} from rest and {ms('one row ahead' + warm)} on a warm card",
        f"take {copies(WIDTH=2)}, {copies(WIDTH=4)} and {copies(WIDTH=8)} ms where 512 bytes take "
        f"{copies()}; by a clock, a row every 4.75 µs, the short ones take {copies(PACE=4750)}",
        f"k07 takes {ms('k07' + long)} ms, at {watts} (the limit is 700) and {mhz}",
        f"Without products it takes {ms('no products' + long)}, at {drawn('no products')[0]}",
        f"draws {drawn('memory floor')[0]} and takes {ms('memory floor' + long)} all the time",
        f"{ms('nn.Conv2d' + long)} ms, where it takes {ms('nn.Conv2d')} from rest",
        f"without turns k07 takes {ms('no turns')} ms from rest and {ms('no turns' + long)} after "
        f"two seconds, at {drawn('no turns')[1]}",
        f"at {drawn('no turns')[1]} the products of a row take {us('no turns')} µs",
        f"at {drawn('k07')[1]} a row's products are {us('k07')} µs",
        f"a turn ends when products are issued, it takes {ms(turns + long)}",
        f"without the clock {ms('no clock' + long)}",
    ]


def words_of_k08s_power() -> list[str]:
    """What notebook 07 says of it."""
    found, again = record.load(ablations.RECORD), record.load(record.DATA_FOLDER / AGAIN)
    rest, warm, long = (found[f"k08{of}"].median for of in ("", ablations.WARM, ablations.LONG))
    watts, mhz = found.made[f"W and MHz of k08{ablations.LONG}"].split(", ")
    return [
        f"from rest take {rest:.2f} ms, warm it takes {warm:.2f} and after two seconds {long:.2f}",
        f"at {float(watts):.0f} W (the limit is 700; the driver's readings go beyond it) and a "
        f"clock of {mhz} MHz",
        f"in this run and {again['k08'].median:.2f} in another",
    ]


def words_of_08_and_09() -> dict[str, str]:
    def longer(series: str, shape: str, number: str) -> float:
        """A rung's time an output over that on the series' base."""
        one = asymmetry.get_series(series)
        of = {one.named(row.shape): row for row in asymmetry.load()[series].rows
              if row.shape.out_channels == one.base.out_channels}  # fmt: skip

        def cost(row: asymmetry.Row) -> float:
            (timing,) = (t for t in row.timings if t.name.startswith(number))
            return timing.median / row.shape.outputs

        return cost(of[shape]) / cost(of[one.named(one.base)])

    def more(series: str, number: str, *shapes: str) -> list[float]:
        """Percent that a method takes longer an output than on the series' base."""
        one = asymmetry.get_series(series)
        names, relative = [one.named(s) for s in one.shapes], asymmetry.load()[series].relative(one)
        return [100 * (relative[number][names.index(shape)] - 1) for shape in shapes]

    odd = {
        n: more("pitch", n, "1021 of 1023", "1023 of 1025")
        for n in ("k01", "k02", "k05", "k06", "k07", "k08")
    }

    def span(percents: list[float]) -> str:
        least, most = (f"{by:.0f}" for by in (min(percents), max(percents)))
        return f"{least} %" if least == most else f"{least} to {most} %"

    sectors = {n: more("pitch", n, "1024 of 1026")[0] for n in ("k02", "k06", "k08")}
    at_724 = {
        n: more("aspect", n, "724×724")[0] for n in ("k05", "k08", "channels_last, converting")
    }
    rows = comparison.load_layers().rows
    forward = [row.ratio for row in rows if row.runs and not row.training]
    backward = [row.ratio for row in rows if row.runs and row.training]
    calls = comparison.load_layers().overheads
    detours = [c.ours - c.theirs for c in calls if c.what.startswith(tuple(comparison.DETOURS))]
    noise: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        if not row.runs:
            long = statistics.median(row.milliseconds[comparison.THEIRS]) >= 0.6
            noise[long].append(row.ratio)
    edge = {w: 100 * (longer("strips", w, "k07") - 1) for w in ("130", "514", "1026")}
    whole = predictions.strips(CONTRACT).cost
    hand = {
        (h, w): 100 * (predictions.strips(CONTRACT.with_(height=h, width=w)).cost / whole - 1)
        for h, w in ((510, 1028), (1016, 516), (4011, 132), (724, 724), (8192, 64), (64, 8192))
    }
    alone = 100 * (predictions.strips(CONTRACT.with_(batch=1)).cost / whole - 1)
    batch = asymmetry.get_series("batch")
    relative = asymmetry.load()["batch"].relative(batch)["k07"]
    many = [100 * (relative[i] - 1) for i, shape in enumerate(batch.shapes) if shape.batch >= 16]
    assert abs(longer("aspect", "1024×512", "k07") - 1) <= 0.01  # "turned on its side"
    small = longer("growth", "1×128×256", "k07")
    sizes = asymmetry.get_series("growth")
    k07_ms = [t.median for t in asymmetry.load()["growth"].timings(sizes)["k07"]]
    outputs = [shape.outputs for shape in sizes.shapes]
    base = sizes.shapes.index(sizes.base)
    took, share = 1e3 * k07_ms[0], 1e3 * k07_ms[base] * outputs[0] / outputs[base]
    on_64 = [predictions.strips(of, tile_w=64).cost
             for of in (CONTRACT.with_(height=724, width=724), CONTRACT)]  # fmt: skip
    by_64 = 100 * (on_64[0] / on_64[1] - 1)
    turns = asymmetry.load()["orientation"].costs(asymmetry.get_series("orientation"))
    lanes = [turns["k03 ALONG_HEIGHT=1"][i] / turns["k03"][i] for i in (0, 1, 2)]
    along = min(lanes[:2]), lanes[2]
    largest = max((row.shape for row in asymmetry.load()["growth"].rows), key=lambda s: s.batch)
    held = 4 * (math.prod(largest.input_shape) + largest.outputs) / 1e9
    memory = asymmetry.load()["growth"].made["memory_bytes"] / 1e9
    square = 100 * (longer("aspect", "724×724", "k07") - 1)
    at = {name: [shape.batch for shape in batch.shapes].index(n) for name, n in
          {"one": 1, "eight": 8, "many": 32}.items()}  # fmt: skip
    images = asymmetry.load()["batch"]
    ms = {
        n: [images.timings(batch)[n][at[k]].median for k in ("one", "eight")]
        for n in ("k01", "k02")
    }
    dearer = {n: images.relative(batch)[n][at["many"]] for n in ms}
    tall = asymmetry.get_series("orientation")
    turned = asymmetry.load()["orientation"].relative(tall)["k04 TILE_H=1 TILE_W=256"][-1]
    costs = asymmetry.load()["compiled"].costs(asymmetry.get_series("compiled"))
    eager, default, tuned = (costs[n] for n in ("nn.Conv2d", *(p.name for p in measure.COMPILED)))
    ladder = record.load(record.LADDER)
    in_ladder = [ladder[n].median for n in ("nn.Conv2d", *(p.name for p in measure.COMPILED))]
    slower = [100 * (ours / theirs - 1) for ours, theirs in zip(default, eager, strict=True)]
    gained = [100 * (1 - ours / theirs) for ours, theirs in zip(tuned, eager, strict=True)]
    return {
        f"k07 {span(odd['k07'])}, k08 {span(odd['k08'])}, k06 {span(odd['k06'])}": "08_asymmetry",
        f"must copy by 4: {sectors['k08']:.0f} % at 1026": "08_asymmetry",
        f"k01 takes {span(odd['k01'])} longer, and k02 up to {max(odd['k02']):.0f}": "08_asymmetry",
        f"k05 takes {span(odd['k05'])} longer": "08_asymmetry",
        f"are worth {-sectors['k06']:.0f} % to k06": "08_asymmetry",
        f"k02 gains {-sectors['k02']:.0f} % at 1024": "08_asymmetry",
        f"at 724×724 k05 takes {at_724['k05']:.0f} % more and channels_last, converting, "
        f"{-at_724['channels_last, converting']:.0f} % less": "08_asymmetry",
        f"k08 takes {-at_724['k08']:.0f} % less, where its strips say {by_64:.0f} "
        "more": "08_asymmetry",
        f"is faster there by {-more('aspect', 'k08', '8192×64')[0]:.0f} %": "08_asymmetry",
        f"k06 wants {more('batch', 'k06', '1')[0]:.0f} % more for one": "08_asymmetry",
        f"it would take {share:.0f} µs, not {took:.0f}": "08_asymmetry",
        f"a factor of {along[0]:.0f} on a wide picture, and of {along[1]:.1f} on "
        "a high": "08_asymmetry",
        f"k07 takes {square:.0f} % longer where its strips alone say "
        f"{hand[724, 724]:.0f}": "08_asymmetry",
        f"k07 takes {longer('aspect', '8192×64', 'k07'):.2f} times its time; products alone "
        f"would say {1 + hand[8192, 64] / 100:.2f}": "08_asymmetry",
        f"cost it {edge['1026']:.0f} % at 1026 (by hand {hand[510, 1028]:.0f})": "08_asymmetry",
        f"and {edge['514']:.0f} % at 514 (by hand {hand[1016, 516]:.0f})": "08_asymmetry",
        f"At 130 it is {edge['130']:.0f} % where the products alone would say "
        f"{hand[4011, 132]:.0f}": "08_asymmetry",
        f"are 64 columns, pays {100 * (longer('strips', '130', 'k08') - 1):.0f} %": "08_asymmetry",
        **dict.fromkeys(claims_of_runs(), "08_asymmetry"),
        f"{hand[724, 724]:.0f} % more at 724 (six strips for 5.6), {hand[64, 8192]:.0f} % for "
        "64×8192": "08_asymmetry",
        f"{alone:.0f} % more by hand for a single image": "08_asymmetry",
        f"{100 * (relative[0] - 1):.0f} % more for a single image on k07": "08_asymmetry",
        f"from 16 on it takes {span([-by for by in many])} less an image": "08_asymmetry",
        f"up to {largest.batch} images": "08_asymmetry",
        f"{held:.1f} GB of the GPU's {memory:.0f}": "08_asymmetry",
        f"k07 takes {small:.1f} times as long for each": "08_asymmetry",
        f"the full {longer('aspect', '8192×64', 'k05'):.2f}": "08_asymmetry",
        f"one image takes k01 {ms['k01'][0]:.0f} ms where eight take {ms['k01'][1]:.0f} "
        f"(k02 {ms['k02'][0]:.0f} and {ms['k02'][1]:.0f})": "08_asymmetry",
        f"at 32 by {dearer['k01']:.1f} times (k02 {dearer['k02']:.1f})": "08_asymmetry",
        f"1 × 256 takes {turned:.1f} times as long an output on 64": "08_asymmetry",
        f"its default takes {span(slower)} longer": "08_asymmetry",
        f"`max-autotune` gains {span(gained)}": "08_asymmetry",
        f"it takes {100 * (in_ladder[1] / in_ladder[0] - 1):.0f} % longer and `max-autotune` gains "
        f"{100 * (1 - in_ladder[2] / in_ladder[0]):.0f} %": "08_asymmetry",
        f"forward is {min(forward):.1f} to {max(forward):.1f} times as fast": "09_drop_in",
        f"{min(backward):.2f} to {max(backward):.1f} times": "09_drop_in",
        f"{min(detours):.0f} to {max(detours):.0f} more, in a function mode": "09_drop_in",
        f"{min(noise[True]):.3f} to {max(noise[True]):.3f} where": "09_drop_in",
        f"{min(noise[False]):.2f} to {max(noise[False]):.2f} below": "09_drop_in",
    }


@pytest.mark.parametrize("words", [words_of_00_to_07, words_of_08_and_09])
def test_what_they_say_in_words_is_what_the_records_give(words: Callable[[], dict]) -> None:
    for sentence, stem in words().items():
        notebook = nbformat.read(study.notebooks()[IDS.index(stem)], as_version=4)
        text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        assert sentence in text, f"{stem}: {sentence}"


def test_the_study_runs_a_notebook_and_draws_the_figures(tmp_path: Path) -> None:
    console = Console(width=100, record=True)
    study.run(tmp_path / "out", ["01"], console)
    printed = console.export_text()
    assert (tmp_path / "out" / "01_seed.ipynb").exists()
    assert (tmp_path / "out" / "figures" / "ladder.svg").exists()
    assert "k02_block_per_pixel" in printed
    assert "H100" in printed
    assert not list((tmp_path / "out").glob(".*")), "a temporary file is left"


def test_a_failing_cell_is_named_and_what_ran_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print('so far')"), nbformat.v4.new_code_cell("1 / 0")]
    )
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(broken, folder / "00_broken.ipynb")
    monkeypatch.setattr(study, "NOTEBOOKS", folder)
    with pytest.raises(study.StudyError, match=r"00_broken\.ipynb, cell 2: ZeroDivisionError"):
        study.run(tmp_path / "out", None, Console())
    assert "so far" in (tmp_path / "out" / "00_broken.ipynb").read_text()


def test_unknown_notebooks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(study.StudyError, match="no notebook '77'"):
        study.notebooks(["77"])
    monkeypatch.setattr(study, "NOTEBOOKS", tmp_path / "nowhere")
    with pytest.raises(study.StudyError, match="from a clone"):
        study.notebooks()
