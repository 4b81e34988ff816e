"""override_norm on a GPU, in one launch for all segments.

As in rms_norm, a program holds whole rows in registers, in the same tiles: with the base's own
weight the bits are the base's own. x, y, g and b pass through memory once for a segment's program;
a long segment is shared by several, which each read g and b, from cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..gpu.launch import Launch
from ..gpu.registry import register
from ..gpu.rows import PLACE, PROMPT, ROWS, Place, check_place, flat, production_places, require
from ..gpu.shapes import Shapes, shape_only
from ..rms_norm.gpu import tile_of
from ..tables import PrimitiveTable, Segments
from .gpu_kernels import override_norm_kernel
from .op import Cell


def override_launch(y: Tensor, x: Tensor, eps: float, centered: bool, place: Place) -> Launch:
    """y[i:j] = g * normalized(x[i:j]) + b."""
    heads, size = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
    tile = tile_of(size)
    return Launch(
        override_norm_kernel,
        (place.num_segments, place.parts(max(tile.rows // heads, 1))),
        {
            "y": y,
            "x": x,
            **place.segments,
            "eps": eps,
            "heads": heads,
            "size": size,
            "row_stride": x.stride(0),
            "head_stride": x.stride(1) if x.dim() == 3 else 0,
        },
        {
            "CENTERED": centered,
            "FIELDS": len(Cell._fields),
            "BLOCK_ROWS": tile.rows,
            "BLOCK": tile.columns,
        },
        num_warps=tile.num_warps,
    )


def override_norm(
    y: Tensor,
    x: Tensor,
    table: PrimitiveTable,
    row: int,
    segments: Segments,
    eps: float,
    centered: bool,
) -> None:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    check_place("override_norm", y, table, [x])
    require(x.dim() in (2, 3), "override_norm: x must be (rows, size) or (rows, heads, size)", x)
    _OVERRIDE(y, x, eps, centered, *flat(table, row, segments))


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Of the residual stream, and of the heads of queries."""
    for rows, place in zip((ROWS, PROMPT), production_places(dtype), strict=True):
        x = shape_only(rows, shapes.hidden, dtype=dtype)
        heads = shape_only(rows, shapes.heads, shapes.head_dim, dtype=dtype)
        for centered in (False, True):
            yield override_launch(x, x, 1e-5, centered, place)
            yield override_launch(heads, heads, 1e-5, centered, place)


def _run(y: Tensor, x: Tensor, eps: float, centered: bool, *place: Any) -> None:
    override_launch(y, x, eps, centered, Place(*place)).run()


_OVERRIDE = register(
    f"override_norm(Tensor(a!) y, Tensor x, float eps, bool centered, {PLACE}) -> ()", _run
)
