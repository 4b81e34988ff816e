"""correct_affine on a GPU, in two launches for all segments and targets of a site:

    shrink  h[split, t, i] = A[:, k in split] x[i, k in split],     float32,
    expand  y[i, columns(t)] = g * y[i, columns(t)] + w (sum over splits of h[:, t, i] B + c).

The inner dimension of shrink is split over programs, since a decode step has too few rows to fill a
GPU with anything else; each split writes a plane of its own, so that nothing is cleared first and
no order of additions is left to chance. A long segment's blocks of rows are shared by programs too.
Ranks are exact: beyond a segment's rank no row of A or B is read. A segment of one row (decode) is
multiplied by vector units, longer ones by matrix units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Argument, Launch
from ..gpu.tuning import Key
from .gpu_kernels import expand_kernel, shrink_kernel
from .op import Cell


class Config(NamedTuple):
    """How the two launches are cut into programs.

    Attributes:
        rows: Rows multiplied at once; 1 means vector units, else at least 16.
        rank: Rank rows at once.
        block_in: Inputs at once in shrink.
        splits: Programs that share a segment's inputs.
        block_out: Output columns of a program of expand.
        num_warps: Of both.
    """

    rows: int
    rank: int
    block_in: int
    splits: int
    block_out: int
    num_warps: int


CONFIGS = (
    Config(1, 16, 256, 8, 256, 4),
    Config(1, 16, 512, 4, 512, 4),
    Config(1, 32, 128, 16, 256, 4),
    Config(16, 16, 128, 8, 128, 4),
    Config(16, 32, 64, 8, 256, 4),
    Config(64, 16, 64, 4, 64, 4),
    Config(64, 64, 64, 2, 64, 4),
    Config(64, 32, 64, 1, 128, 8),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    if key.rows <= 16:
        return 3 if key.inner <= 16 else 4
    return 5 if key.inner <= 16 else 6


def launches(site: Site, config: int) -> Sequence[Launch]:
    """Shrink, then expand."""
    chosen, num_rows = CONFIGS[config], site.x.shape[0]
    inner = max(site.max_inner, 1)
    h = torch.empty(
        (chosen.splits, site.num_targets, num_rows, inner),
        dtype=torch.float32,
        device=site.x.device,
    )
    shared = {
        "FIELDS": len(Cell._fields),
        "SPLITS": chosen.splits,
        "BLOCK_ROWS": chosen.rows,
        "BLOCK_RANK": chosen.rank,
    }
    sizes: dict[str, Argument] = {"h": h, "num_rows": num_rows, "max_inner": inner}
    matrix = chosen.rows > 1
    rank_blocks = triton.cdiv(site.max_inner, chosen.rank)
    across, columns = chosen.splits * rank_blocks, triton.cdiv(site.widest, chosen.block_out)
    shrink_parts, expand_parts = (site.parts(chosen.rows, each) for each in (across, columns))
    shrink = Launch(
        shrink_kernel,
        (site.num_segments, site.num_targets, across * shrink_parts),
        {
            "x": site.x,
            **sizes,
            **site.segments,
            "parts": shrink_parts,
            "in_size": site.x.shape[1],
            "x_stride": site.x.stride(0),
        },
        {**shared, "BLOCK_IN": chosen.block_in},
        num_warps=chosen.num_warps,
        matrix=matrix,
    )
    expand = Launch(
        expand_kernel,
        (site.num_segments, site.num_targets, columns * expand_parts),
        {
            "y": site.y,
            **sizes,
            **site.segments,
            **site.columns,
            "seg_weight": site.weight,
            "y_stride": site.y.stride(0),
            "num_targets": site.num_targets,
            "parts": expand_parts,
        },
        {**shared, "BLOCK_OUT": chosen.block_out},
        num_warps=chosen.num_warps,
        matrix=matrix,
    )
    return (shrink, expand)


CORRECT_AFFINE = Correction("correct_affine", launches, choose_config, len(CONFIGS))
