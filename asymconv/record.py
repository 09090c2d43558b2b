"""Measurements as files: what the notebooks, figures and tables are made from.

A record is one JSON file under figures/data/, written by one run on one GPU. It names the GPU,
driver, versions, git revision, each kernel's source hash and every repeat. Nothing else in the
house holds a measured number.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from asymconv.kernels import RUNGS, Rung
from asymconv.measure import PEERS, Kind, Peer, Timing, check_and_time, time_ceilings
from asymconv.problem import CONTRACT, ConvShape

FORMAT = 1

DATA_FOLDER = Path(__file__).resolve().parent.parent / "figures" / "data"
LADDER = DATA_FOLDER / "ladder.json"
"""The published record: every rung, the peers and the ceilings on the contract's shape."""

VARIANTS = DATA_FOLDER / "variants.json"
"""The published record of rungs with other tile constants."""

LADDER_VARIABLE = "ASYMCONV_LADDER"
"""Environment variable: a ladder record to show in place of the published one."""


def environment() -> dict[str, str | int]:
    """The machine and its software, as a record names them. Needs a CUDA device."""
    from asymconv.build import nvcc_version

    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "driver": smi("driver_version"),
        "max_clock_mhz": int(smi("clocks.max.sm") or 0),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nvcc": nvcc_version(),
        "python": platform.python_version(),
        "revision": revision(),
        "date": now(),
    }


def now() -> str:
    """The time as records have it: date, hours and minutes, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def revision() -> str:
    """The git revision of this tree, with "+" if it was changed since; ``$ASYMCONV_REVISION`` wins.

    A copy of the tree without .git has neither: "unknown".
    """
    if given := os.environ.get("ASYMCONV_REVISION"):
        return given
    folder = str(Path(__file__).resolve().parent.parent)
    commit = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return (commit + ("+" if changed else "")) or "unknown"


def smi(fields: str) -> str:
    """Fields of the first GPU from nvidia-smi, without units; "" where there is none."""
    lines = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return lines.splitlines()[0] if lines else ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def short_name(name: str) -> str:
    """What figures and look-ups call a method: a rung by its number, others by their name."""
    return name.split("_", 1)[0] if re.match(r"k\d\d_", name) else name


def significant(value: float) -> str:
    """A positive number as tables and figures print it, without an exponent.

    Three significant digits, or all before the point: 2112, 14.3, 2.00, 0.00210.
    """
    if value <= 0:
        return f"{value:g}"
    rounded = float(f"{value:.2e}")  # 9.999 is 10.0, not 10.00
    return f"{value:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"


@dataclass(frozen=True)
class Record:
    """One run's measurements.

    Attributes:
        title: what was measured.
        shape: the convolution.
        made: where and with what (`environment`).
        timings: every method of the run.
        left_out: rungs and peers that are not among them, and why.
    """

    title: str
    shape: ConvShape
    made: Mapping[str, str | int]
    timings: tuple[Timing, ...]
    left_out: Mapping[str, str]

    @property
    def gpu(self) -> str:
        """The GPU's name."""
        return str(self.made["gpu"])

    def of_kind(self, kind: Kind) -> list[Timing]:
        """The timings of one kind, in the record's order."""
        return [t for t in self.timings if t.kind == kind]

    def __getitem__(self, name: str) -> Timing:
        """The timing of this method; a rung also by its number. Raises KeyError."""
        for timing in self.timings:
            if name in (timing.name, short_name(timing.name)):
                return timing
        raise KeyError(f"no {name!r} in {self.title!r}; it has {[t.name for t in self.timings]}")

    def __contains__(self, name: str) -> bool:
        return any(name in (t.name, short_name(t.name)) for t in self.timings)

    def save(self, path: Path) -> None:
        """Write the record; the file is whole or not there."""
        write_json(path, self._as_json())

    def _as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "title": self.title,
            "shape": asdict(self.shape),
            "made": dict(self.made),
            "timings": [asdict(t) for t in self.timings],
            "left_out": dict(self.left_out),
        }


def make(
    title: str, shape: ConvShape, timings: Sequence[Timing], left_out: Mapping[str, str]
) -> Record:
    """A record of timings just taken on this machine's GPU."""
    return Record(title, shape, environment(), tuple(timings), dict(left_out))


def measure_ladder(
    shape: ConvShape = CONTRACT, rungs: Sequence[Rung] = RUNGS, peers: Sequence[Peer] = PEERS
) -> Record:
    """Check and time rungs, peers and ceilings on this machine's GPU, in one run.

    Raises what `measure.check_and_time` raises.
    """
    timings, left_out = check_and_time(shape, rungs, peers)
    timings += time_ceilings(shape)
    of = "the contract's shape" if shape == CONTRACT else "another layer"
    return make(f"The ladder on {of}", shape, timings, left_out)


def ladder_path() -> Path:
    """The ladder's record: what ``$ASYMCONV_LADDER`` names, else the published one."""
    return Path(os.environ.get(LADDER_VARIABLE, LADDER))


def load(path: Path | None = None) -> Record:
    """Read a record; the ladder's if no path is given.

    Raises:
        FileNotFoundError: there is none; says how to make it.
        ValueError: it is of another format.
    """
    data = read_json(path or ladder_path(), "asymconv bench --record", FORMAT)
    timings = tuple(read_timing(timing) for timing in data["timings"])
    shape = ConvShape(**data["shape"])
    return Record(data["title"], shape, data["made"], timings, data["left_out"])


def read_json(path: Path, command: str, version: int | None = None) -> dict[str, Any]:
    """A record's JSON.

    Args:
        path: its file.
        command: what makes it.
        version: the format that it must have, if it names one.

    Raises:
        FileNotFoundError: there is none; says how to make it.
        ValueError: it is of another format.
    """
    if not path.exists():
        raise FileNotFoundError(f"no record {path}: it is made by `{command}`")
    data = json.loads(path.read_text())
    if version is not None and (its := data.get("format")) != version:
        raise ValueError(f"{path} has format {its}, this version reads {version}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a record's JSON; the file is whole or not there.

    Raises:
        ValueError: a number is infinite or NaN, which JSON has not.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def read_timing(data: Mapping[str, Any]) -> Timing:
    """A timing as JSON has it."""
    return Timing(**data | {"milliseconds": tuple(data["milliseconds"])})


def write_atomically(path: Path, text: str) -> None:
    """Write a text file (UTF-8) through a temporary one and a rename: whole or not at all.

    Makes the folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
