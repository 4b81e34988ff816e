"""Corrections that are one product a target, computed in tiles of rows and output columns."""

from typing import Any, NamedTuple

from .corrections import Site
from .launch import Launch


class Tile(NamedTuple):
    """How such a launch is cut.

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
    num_stages: int = 2


def launch_tiles(kernel: Any, site: Site, tile: Tile, fields: int) -> Launch:
    """One launch for all segments and targets; programs of one share its tiles.

    Args:
        kernel: The ``triton.jit`` function.
        site: Its operands.
        tile: How it is cut.
        fields: Of a cell.
    """
    return Launch(
        kernel,
        (site.num_segments, site.num_targets, site.num_programs(tile.rows, tile.block_out)),
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
            "FIELDS": fields,
            "BLOCK_ROWS": tile.rows,
            "BLOCK_OUT": tile.block_out,
            "BLOCK_IN": tile.block_in,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix=tile.rows > 1,
    )
