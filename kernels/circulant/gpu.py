"""add_circulant on a GPU: one launch, a product of tiles whose matrix is expanded in registers.

K is out in / b numbers, which stay in the caches for any b but a small one: every element of an
expanded tile is a read of those, not of memory. As in ``dense``, tiles of the same columns run at
the same time, one row (decode) is multiplied by vector units and longer segments by matrix units.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Launch
from ..gpu.tuning import Key
from .gpu_kernels import circulant_kernel
from .op import Cell


class Config(NamedTuple):
    """How the launch is cut into tiles.

    Attributes:
        rows: Of a tile; 1 means vector units, else at least 16.
        block_out: Output columns of a tile.
        block_in: Inputs at once.
        num_warps: Of a program.
    """

    rows: int
    block_out: int
    block_in: int
    num_warps: int


CONFIGS = (
    Config(1, 16, 128, 4),
    Config(1, 8, 256, 4),
    Config(16, 32, 64, 4),
    Config(16, 64, 64, 4),
    Config(64, 64, 32, 4),
    Config(64, 64, 64, 8),
    Config(128, 64, 32, 8),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    if key.rows <= 16:
        return 2
    return 4 if key.rows <= 64 else 6


def launches(site: Site, config: int) -> Sequence[Launch]:
    """One."""
    chosen = CONFIGS[config]
    return (
        Launch(
            circulant_kernel,
            (
                site.num_segments,
                site.num_targets,
                site.num_programs(chosen.rows, chosen.block_out),
            ),
            {
                "y": site.y,
                "x": site.x,
                **site.segments,
                **site.columns,
                **site.strides,
                "in_size": site.x.shape[1],
                "seg_weight": site.weight,
            },
            {
                "FIELDS": len(Cell._fields),
                "BLOCK_ROWS": chosen.rows,
                "BLOCK_OUT": chosen.block_out,
                "BLOCK_IN": chosen.block_in,
            },
            num_warps=chosen.num_warps,
            matrix=chosen.rows > 1,
        ),
    )


ADD_CIRCULANT = Correction("add_circulant", launches, choose_config, len(CONFIGS))
