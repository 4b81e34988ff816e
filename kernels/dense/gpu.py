"""add_dense on a GPU: one launch, a grouped product of tiles.

D is all that is large: (out, in), read from memory once for each segment. A program's tiles are
(rows, columns); those of the same columns come one after another and so run at the same time, which
lets the row blocks of a long segment find D in the cache. One row (decode) is multiplied by vector
units, longer segments by matrix units.
"""

from collections.abc import Sequence

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Launch
from ..gpu.tiles import Tile, launch_tiles
from ..gpu.tuning import Key
from .gpu_kernels import dense_kernel
from .op import Cell

CONFIGS = (
    Tile(1, 16, 256, 4, 2),
    Tile(1, 8, 512, 4, 2),
    Tile(1, 32, 128, 4, 2),
    Tile(16, 32, 128, 4, 3),
    Tile(16, 64, 64, 4, 4),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    if key.rows <= 16:
        return 3
    return 5 if key.rows <= 64 else 6


def launches(site: Site, config: int) -> Sequence[Launch]:
    """One."""
    return (launch_tiles(dense_kernel, site, CONFIGS[config], len(Cell._fields)),)


ADD_DENSE = Correction("add_dense", launches, choose_config, len(CONFIGS))
