"""add_kronecker on a GPU, in two launches for all segments and targets of a site:

    right  h[t, i] = X Rᵀ (m, k) in float32, with X = x[i] as (m, n),
    left   Y += w L h[t, i], with Y = y[i, columns(t)] as (l, k).

Both are products of whole segments: all X one below the other have R to their right, all h side by
side have L to their left, so that even one row fills tiles of matrix units where m and k are 16. A
factored R = U D is applied as such; D is then read for each block of k. The sizes l, m and k are
known on the device alone: programs share whatever tiles there are, and h has room for ``max_inner``
numbers a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..gpu.corrections import MAX_PROGRAMS, Correction, Site
from ..gpu.launch import Argument, Launch, ceil_div
from ..gpu.tuning import Key
from .gpu_kernels import kronecker_left_kernel, kronecker_right_kernel
from .op import Cell


class Config(NamedTuple):
    """How the two launches are cut into tiles, all sizes at least 16.

    Attributes:
        block_x: Rows of X in a tile of right.
        block_k: Rows of R in it.
        block_n: Columns of both at once.
        rank: Rows of D at once.
        block_y: Columns of Y in a tile of left.
        block_l: Rows of L in it.
        block_m: Columns of L at once.
        num_warps: Of both.
    """

    block_x: int
    block_k: int
    block_n: int
    rank: int
    block_y: int
    block_l: int
    block_m: int
    num_warps: int


CONFIGS = (
    Config(16, 16, 64, 16, 32, 16, 16, 4),
    Config(16, 32, 64, 16, 64, 16, 16, 4),
    Config(64, 32, 32, 16, 64, 16, 16, 8),
    Config(64, 64, 32, 16, 64, 32, 16, 8),
    Config(128, 32, 32, 16, 128, 32, 16, 8),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    return 2 if 4 < key.rows <= 64 else 1


def launches(site: Site, config: int) -> Sequence[Launch]:
    """Right, then left."""
    chosen, num_rows = CONFIGS[config], site.x.shape[0]
    inner = max(site.max_inner, 1)
    h = torch.empty((site.num_targets, num_rows, inner), dtype=torch.float32, device=site.x.device)
    sizes: dict[str, Argument] = {"h": h, "num_rows": num_rows, "max_inner": inner}
    fields = {"FIELDS": len(Cell._fields)}
    out_sizes = {name: size for name, size in site.columns.items() if name.startswith("out_size")}
    right = Launch(
        kronecker_right_kernel,
        (
            site.num_segments,
            site.num_targets,
            _num_programs(site, inner, chosen.block_x * chosen.block_k),
        ),
        {
            "x": site.x,
            **sizes,
            **site.segments,
            **out_sizes,
            "in_size": site.x.shape[1],
            "x_stride": site.x.stride(0),
        },
        {
            **fields,
            "BLOCK_X": chosen.block_x,
            "BLOCK_N": chosen.block_n,
            "BLOCK_RANK": chosen.rank,
            "BLOCK_K": chosen.block_k,
        },
        num_warps=chosen.num_warps,
        matrix=True,
    )
    left = Launch(
        kronecker_left_kernel,
        (
            site.num_segments,
            site.num_targets,
            _num_programs(site, site.widest, chosen.block_y * chosen.block_l),
        ),
        {
            "y": site.y,
            **sizes,
            **site.segments,
            **site.columns,
            "seg_weight": site.weight,
            "y_stride": site.y.stride(0),
        },
        {
            **fields,
            "BLOCK_Y": chosen.block_y,
            "BLOCK_M": chosen.block_m,
            "BLOCK_L": chosen.block_l,
        },
        num_warps=chosen.num_warps,
        matrix=True,
    )
    return (right, left)


def _num_programs(site: Site, width: int, tile: int) -> int:
    """As many as full tiles have room for all rows' numbers; tiles that are not full are shared."""
    return min(ceil_div(site.max_rows * width, tile), MAX_PROGRAMS)


ADD_KRONECKER = Correction("add_kronecker", launches, choose_config, len(CONFIGS))
