"""add_dense on a GPU: one launch, a grouped product of tiles.

D is all that is large: (out, in), read from memory once for each segment. A program's tiles are
(rows, columns); those of the same columns come one after another and so run at the same time, which
lets the row blocks of a long segment find D in the cache. One row (decode) is multiplied by vector
units, longer segments by matrix units.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Launch
from ..gpu.tuning import Key
from .gpu_kernels import dense_kernel
from .op import Cell


class Config(NamedTuple):
    """How the launch is cut into tiles.

    Attributes:
        rows: Of a tile; 1 means vector units, else at least 16.
        block_out: Output columns of a tile.
        block_in: Inputs at once.
        num_warps: Of a program.
        num_stages: Blocks of inputs that are under way at once.
    """

    rows: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


CONFIGS = (
    Config(1, 16, 256, 4, 2),
    Config(1, 8, 512, 4, 2),
    Config(1, 32, 128, 4, 2),
    Config(16, 32, 128, 4, 3),
    Config(16, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 3),
    Config(64, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    if key.rows <= 16:
        return 3
    return 5 if key.rows <= 64 else 7


def launches(site: Site, config: int) -> Sequence[Launch]:
    """One."""
    chosen = CONFIGS[config]
    return (
        Launch(
            dense_kernel,
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
            num_stages=chosen.num_stages,
            matrix=chosen.rows > 1,
        ),
    )


ADD_DENSE = Correction("add_dense", launches, choose_config, len(CONFIGS))
