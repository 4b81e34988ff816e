"""add_circulant on a GPU: one launch, a product of tiles whose matrix is expanded in registers.

K is out in / b numbers, which stay in the caches for any b but a small one: every element of an
expanded tile is a read of those, not of memory. As in ``dense``, tiles of the same columns run at
the same time, one row (decode) is multiplied by vector units and longer segments by matrix units.
"""

from collections.abc import Sequence

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Launch
from ..gpu.tiles import Tile, launch_tiles
from ..gpu.tuning import Key
from .gpu_kernels import circulant_kernel
from .op import Cell

CONFIGS = (
    Tile(1, 16, 128, 4),
    Tile(1, 8, 256, 4),
    Tile(16, 32, 64, 4),
    Tile(16, 64, 64, 4),
    Tile(64, 64, 32, 4),
    Tile(64, 64, 64, 8),
    Tile(128, 64, 32, 8),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    return 2 if key.rows <= 16 else 4


def launches(site: Site, config: int) -> Sequence[Launch]:
    """One."""
    return (launch_tiles(circulant_kernel, site, CONFIGS[config], len(Cell._fields)),)


ADD_CIRCULANT = Correction("add_circulant", launches, choose_config, len(CONFIGS))
