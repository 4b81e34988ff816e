"""correct_affine on a GPU, in two launches for all segments and targets of a site:

    shrink  h[split, t, i] = A[:, k in split] x[i, k in split],     float32,
    expand  y[i, columns(t)] = g * y[i, columns(t)] + w (sum over splits of h[:, t, i] B + c).

The inner dimension of shrink is split over programs, since a decode step has too few rows to fill a
GPU with anything else; each split writes a plane of its own, so that nothing is cleared first and
no order of additions is left to chance. A long segment's blocks of rows are shared by programs too.
Ranks are exact: beyond a segment's rank no row of A or B is read. A segment of one row (decode) is
multiplied by vector units, longer ones by matrix units; in expand, up to four rows one after the
other by vector units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Argument, Launch, ceil_div, power_of_two
from ..gpu.tuning import Key
from .gpu_kernels import expand_kernel, shrink_kernel
from .op import Cell


class Shrink(NamedTuple):
    """How shrink is cut into programs.

    Attributes:
        rows: Rows multiplied at once; 1 means vector units, else at least 16.
        rank: Rank rows at once.
        block_in: Inputs at once.
        span: Inputs of a program; how many programs share a segment's inputs follows from it.
        num_warps: Of a program.
        num_stages: Blocks of inputs that are under way at once, where matrix units multiply.
    """

    rows: int
    rank: int
    block_in: int
    span: int
    num_warps: int
    num_stages: int = 2


class Expand(NamedTuple):
    """How expand is cut into programs.

    Attributes:
        rows: Rows multiplied at once; 1 means vector units, else at least 16.
        rank: Rank rows at once.
        block_out: Output columns of a program.
        num_warps: Of a program. Where vector units multiply, each warp should have 256 columns for
            its own: a sum over ranks that lie in several warps takes as long as the rest.
    """

    rows: int
    rank: int
    block_out: int
    num_warps: int


class Config(NamedTuple):
    """How the two launches are cut."""

    shrink: Shrink
    expand: Expand


CONFIGS = (
    Config(Shrink(1, 16, 256, 512, 2), Expand(1, 16, 1024, 4)),
    Config(Shrink(16, 16, 128, 512, 2, 3), Expand(1, 16, 1024, 4)),
    Config(Shrink(16, 32, 128, 512, 4, 3), Expand(1, 16, 1024, 4)),
    Config(Shrink(16, 16, 128, 512, 2, 3), Expand(16, 16, 256, 4)),
    Config(Shrink(16, 32, 128, 512, 4, 3), Expand(16, 16, 256, 4)),
    Config(Shrink(64, 16, 64, 512, 4, 3), Expand(16, 16, 256, 4)),
    Config(Shrink(64, 64, 64, 512, 4, 3), Expand(32, 16, 256, 4)),
    Config(Shrink(64, 16, 64, 1024, 4, 3), Expand(32, 16, 256, 4)),
    Config(Shrink(64, 64, 64, 1024, 4, 3), Expand(32, 16, 256, 4)),
)
"""In the order of ``choose_config``: of what spills no registers, the fastest that was found on an
H200 at the sites of an 8B base."""


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    longer = sum(key.rows > bound for bound in (4, 16, 64))
    return 1 + 2 * longer + (key.inner > 16)


_INNER = 16
"""Numbers that the rows of h are a multiple of; no block of ranks is shorter."""

_PLANE_NUMBERS = 4096
"""Of h that a program of expand holds at once."""


def launches(site: Site, config: int) -> Sequence[Launch]:
    """Shrink, then expand."""
    (chosen, out), num_rows = CONFIGS[config], site.x.shape[0]
    splits = max(ceil_div(site.x.shape[1], chosen.span), 1)
    # Rows of h begin where vectors of four can be read, whatever the rank.
    inner = max(ceil_div(site.max_inner, _INNER) * _INNER, _INNER)
    h = torch.empty(
        (splits, site.num_targets, num_rows, inner),
        dtype=torch.float32,
        device=site.x.device,
    )
    shared = {"FIELDS": len(Cell._fields), "SPLITS": splits}
    sizes: dict[str, Argument] = {"h": h, "num_rows": num_rows, "max_inner": inner}
    across = splits * ceil_div(site.max_inner, chosen.rank)
    columns = ceil_div(site.widest, out.block_out)
    shrink_parts, expand_parts = site.parts(chosen.rows, across), site.parts(out.rows, columns)
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
        {
            **shared,
            "BLOCK_ROWS": chosen.rows,
            "BLOCK_RANK": chosen.rank,
            "BLOCK_IN": chosen.block_in,
        },
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        matrix=chosen.rows > 1,
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
        {
            **shared,
            "BLOCK_ROWS": out.rows,
            "BLOCK_RANK": out.rank,
            "BLOCK_OUT": out.block_out,
            "PLANES": _planes(out, splits),
        },
        num_warps=out.num_warps,
        num_stages=1,  # a second block of ranks is rare, and its room would be all programs'
        matrix=out.rows > 1,
    )
    return (shrink, expand)


def _planes(chosen: Expand, splits: int) -> int:
    """Planes that expand reads at once: all of them, or so many that they fit its registers."""
    most = max(_PLANE_NUMBERS // (chosen.rows * chosen.rank), 1)
    return min(power_of_two(splits), most)


CORRECT_AFFINE = Correction("correct_affine", launches, choose_config, len(CONFIGS))
