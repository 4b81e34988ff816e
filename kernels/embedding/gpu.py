"""replace_rows and correct_embedding on a GPU, in one launch each for all segments.

replace_rows: a program takes every n-th row of a segment, finds the row's token among the sorted
ids in two or three waits for memory, and copies the row of R. No more is read of R than is used.

correct_embedding: a program has a block of columns of some of a segment's rows. It reads the rows
of A that their tokens name, and its columns of B once for each block of rows; so A is read by every
program of a row, rank numbers each, from cache. One row at a time (decode) is multiplied by vector
units, several by matrix units.

Unlike the CPU's, these cannot raise IndexError: a row whose token is outside is left alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..gpu.launch import Launch, ceil_div
from ..gpu.registry import register
from ..gpu.rows import PLACE, PROMPT, ROWS, Place, check_place, flat, production_places, require
from ..gpu.shapes import Shapes, shape_only
from ..tables import PrimitiveTable, Segments
from .gpu_kernels import correct_embedding_kernel, replace_rows_kernel
from .op import AffineCell, RowsCell

COPIED = 1024
"""Columns that replace_rows copies at once."""

SEARCHED = 128
"""Parts in which ids are searched: one step for up to as many ids, two for its square."""

BLOCK = 256
BLOCK_RANK = 16
"""Columns and rank rows of B that correct_embedding has at once."""


def replace_launch(x: Tensor, ids: Tensor, place: Place) -> Launch:
    """x[i] = R[k] where ids[k] is the token of row i."""
    return Launch(
        replace_rows_kernel,
        (place.num_segments, place.parts(1)),
        {
            "x": x,
            "ids": ids,
            **place.segments,
            "indices": place.indices,
            "hidden": x.shape[1],
        },
        {"FIELDS": len(RowsCell._fields), "SEARCH": SEARCHED, "BLOCK": COPIED},
    )


def correct_launch(x: Tensor, ids: Tensor, place: Place) -> Launch:
    """x[i] = g * x[i] + w A[token of i] B."""
    hidden = x.shape[1]
    rows = 1 if place.max_rows <= 1 else 16
    blocks = ceil_div(hidden, BLOCK)
    return Launch(
        correct_embedding_kernel,
        (place.num_segments, place.parts(rows, blocks), blocks),
        {
            "x": x,
            "ids": ids,
            **place.segments,
            "seg_weight": place.weight,
            "hidden": hidden,
        },
        {
            "FIELDS": len(AffineCell._fields),
            "BLOCK_ROWS": rows,
            "BLOCK_RANK": BLOCK_RANK,
            "BLOCK": BLOCK,
        },
        matrix=rows > 1,
    )


def replace_rows(
    x: Tensor, ids: Tensor, table: PrimitiveTable, row: int, segments: Segments
) -> None:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    _check("replace_rows", x, ids, table)
    _REPLACE(x, ids, *flat(table, row, segments))


def correct_embedding(
    x: Tensor, ids: Tensor, table: PrimitiveTable, row: int, segments: Segments
) -> None:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    _check("correct_embedding", x, ids, table)
    _CORRECT(x, ids, *flat(table, row, segments))


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Both, of a decode step and of a prompt."""
    for rows, place in zip((ROWS, PROMPT), production_places(dtype), strict=True):
        x, ids = shape_only(rows, shapes.hidden, dtype=dtype), shape_only(rows, dtype=torch.int64)
        yield replace_launch(x, ids, place)
        yield correct_launch(x, ids, place)


def _check(name: str, x: Tensor, ids: Tensor, table: PrimitiveTable) -> None:
    check_place(name, x, table, [])
    require(ids.shape == x.shape[:1], f"{name}: x and ids differ in rows", x, ids)
    whole = ids.dtype is torch.int64 and ids.is_contiguous() and ids.device == x.device
    require(whole, f"{name}: ids must be contiguous int64 on {x.device}", ids)


def _run_replace(x: Tensor, ids: Tensor, *place: Any) -> None:
    replace_launch(x, ids, Place(*place)).run()


def _run_correct(x: Tensor, ids: Tensor, *place: Any) -> None:
    correct_launch(x, ids, Place(*place)).run()


_REPLACE = register(f"replace_rows(Tensor(a!) x, Tensor ids, {PLACE}) -> ()", _run_replace)
_CORRECT = register(f"correct_embedding(Tensor(a!) x, Tensor ids, {PLACE}) -> ()", _run_correct)
