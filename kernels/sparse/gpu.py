"""add_sparse on a GPU: one launch over tiles of rows and output columns.

A program reads the entries of its columns' rows of S side by side, up to the longest, and gathers x
by them; the entries are read once for each block of rows, of which x is small enough to stay in the
cache. There is nothing here for matrix units. Rows of float32 over a pool of 16 bits are read and
written as they are (``spectral``).
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Launch
from ..gpu.tuning import Key
from .gpu_kernels import sparse_kernel
from .op import Cell


class Config(NamedTuple):
    """How the launch is cut into tiles.

    Attributes:
        rows: Of a tile.
        block_out: Output columns of a tile.
        block_entries: Entries of each column at once.
    """

    rows: int
    block_out: int
    block_entries: int


CONFIGS = (
    Config(1, 64, 16),
    Config(1, 32, 32),
    Config(1, 128, 4),
    Config(2, 64, 8),
    Config(8, 32, 8),
    Config(8, 64, 4),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    if key.rows <= 64:
        return 3 if key.rows == 2 else 4
    return 2


def launches(site: Site, config: int) -> Sequence[Launch]:
    """One."""
    chosen = CONFIGS[config]
    return (
        Launch(
            sparse_kernel,
            (
                site.num_segments,
                site.num_targets,
                site.num_programs(chosen.rows, chosen.block_out),
            ),
            {
                "y": site.y,
                "x": site.x,
                "indices": site.indices,
                **site.segments,
                **site.columns,
                **site.strides,
                "seg_weight": site.weight,
            },
            {
                "FIELDS": len(Cell._fields),
                "BLOCK_ROWS": chosen.rows,
                "BLOCK_OUT": chosen.block_out,
                "BLOCK_ENTRIES": chosen.block_entries,
            },
        ),
    )


ADD_SPARSE = Correction(
    "add_sparse", launches, choose_config, len(CONFIGS), allows_float32_rows=True
)
