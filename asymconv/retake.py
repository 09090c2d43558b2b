"""Take anew each record that a command makes, on this machine's GPU, each by itself.

figures/data/ has others, of kernels that are no more: the README lists them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FILES: Mapping[str, str] = {
    "bench": "ladder.json",
    "sweep": "variants.json",
    "strips": "strips.json",
    "ablations": "ablations.json",
    "accuracy": "accuracy.json",
    "asymmetry": "asymmetry.json",
    "layers": "layers.json",
    "network": "network.json",
    "profile": "counters.json",
}
"""The commands that have --record, quick ones first, and the records that they write."""


def retake(
    folder: Path,
    only: Sequence[str] = (),
    *,
    limit: float = 1800.0,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Run the commands in processes of their own, so that one that fails or hangs costs itself.

    Args:
        folder: where the records go.
        only: commands; all of `FILES` unless told.
        limit: seconds that a command may take.
        say: receives a line before and after each.

    Returns:
        The commands that failed; their records are as they were, or, where a command saves as it
        goes, hold what it had.

    Raises:
        KeyError: `only` names a command that writes no record.
    """
    for name in only:
        if name not in FILES:
            raise KeyError(f"{name!r} writes no record; those that do: {', '.join(FILES)}")
    failed = []
    folder.mkdir(parents=True, exist_ok=True)
    for name in only or FILES:
        path = folder / FILES[name]
        command = [sys.executable, "-m", "asymconv.cli", name, "--record", "--output", str(path)]
        say(f"asymconv {name} --record --output {path}")
        begin = time.monotonic()
        try:
            ended = subprocess.run(command, timeout=limit).returncode
            how = "done" if ended == 0 else f"failed with {ended}"
        except subprocess.TimeoutExpired:
            how = f"stopped, since it took more than {limit:g} s"
        say(f"{name}: {how} after {time.monotonic() - begin:.0f} s")
        if how != "done":
            failed.append(name)
    return failed
