"""transform_inputs on a GPU, in one launch a target for all segments, on copies of x.

A stage's blocks read and write the same columns, and no others: so one stage is shared by many
programs, each with the spans (whole blocks) that are its own. With several stages, columns move
between spans from stage to stage; then one program does all of them for its rows, with a barrier
between stages, as their number is not known to the host. That program reads all rotations alone:
a decode step waits for in / 256 tiles a stage and row, which is the price of one launch; only BOFT
with several factors pays it. A block wider than a tile is not shared either.

Rotations are read once for each block of rows, exactly: b of each column's rows. x is read once
and written once; between, the rows lie in scratch (2, rows, in) of float32, since the result is
rounded once, and is read and written once a stage, from cache. A decode step's single rows add up
each column's own block; longer segments multiply by block-diagonal tiles on matrix units.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..gpu.launch import Launch, ceil_div
from ..gpu.registry import register
from ..gpu.rows import (
    PLACE,
    PROGRAMS,
    PROMPT,
    ROWS,
    Place,
    check_cells,
    flat,
    production_places,
    require,
)
from ..gpu.shapes import Shapes, shape_only
from ..tables import PrimitiveTable, Segments, SiteTargets
from .gpu_kernels import transform_input_kernel
from .op import Cell

DEPTH = 16
"""Rows of a block that are added up at once, of one row of x."""


def transform_launch(x: Tensor, place: Place) -> Launch:
    """x[i:j] <- s * x[i:j], then every stage's rotations, in place."""
    num_rows, size = x.shape
    single = place.max_rows <= 1
    rows, block = (1, 256) if single else (16, 32)
    parts = place.parts(rows)
    room = PROGRAMS // max(place.num_segments * parts, 1)
    return Launch(
        transform_input_kernel,
        (place.num_segments, parts, max(1, min(ceil_div(size, block), room))),
        {
            "x": x,
            "scratch": torch.empty((2, num_rows, size), dtype=torch.float32, device=x.device),
            **place.segments,
            "indices": place.indices,
            "num_rows": num_rows,
            "size": size,
            "x_stride": x.stride(0),
        },
        {"FIELDS": len(Cell._fields), "BLOCK_ROWS": rows, "DEPTH": DEPTH, "BLOCK": block},
        num_warps=8 if single else 4,
        num_stages=1,
        matrix=not single,
    )


def transform_inputs(
    x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> Tensor:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    require(
        x.dim() == 2 and x.stride(1) == 1, "transform_inputs: rows must have strides of 1 last", x
    )
    check_cells("transform_inputs", table, x)
    inputs = x.repeat(len(targets.out_starts), 1, 1)
    for position, rows in enumerate(inputs):
        _TRANSFORM(rows, *flat(table, targets.first + position, segments))
    return inputs


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Of the inputs of a layer's first site, in a decode step and in a prompt."""
    for rows, place in zip((ROWS, PROMPT), production_places(dtype), strict=True):
        yield transform_launch(shape_only(rows, shapes.hidden, dtype=dtype), place)


def _run(x: Tensor, *place: Any) -> None:
    transform_launch(x, Place(*place)).run()


_TRANSFORM = register(f"transform_input(Tensor(a!) x, {PLACE}) -> ()", _run)
