"""The ladder: `RUNGS` is the one ordered list of kernels. A new rung is a file and a line here."""

from asymconv.kernels import (
    k01_block_per_output,
    k02_block_per_pixel,
    k03_coalesced,
    k04_shared_tile,
    k05_register_tile,
    k06_tensor_core,
    k07_hopper_ring,
    k08_hopper_split,
)
from asymconv.kernels.rung import ConvStruct, Precision, Rung

RUNGS: tuple[Rung, ...] = (
    k01_block_per_output.RUNG,
    k02_block_per_pixel.RUNG,
    k03_coalesced.RUNG,
    k04_shared_tile.RUNG,
    k05_register_tile.RUNG,
    k06_tensor_core.RUNG,
    k07_hopper_ring.RUNG,
    k08_hopper_split.RUNG,
)


def get_rung(name: str) -> Rung:
    """The rung of this name or number ("k02_block_per_pixel" or "k02").

    Raises:
        KeyError: there is none; the message lists those there are.
    """
    for rung in RUNGS:
        if name in (rung.name, rung.number):
            return rung
    raise KeyError(f"no rung {name!r}; there are {', '.join(r.name for r in RUNGS)}")


__all__ = ["RUNGS", "ConvStruct", "Precision", "Rung", "get_rung"]
