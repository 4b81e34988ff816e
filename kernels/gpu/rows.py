"""What operations on whole rows share on a GPU: a table, a place in it, and segments, as arguments.

Each row of a batch finds its adapter in device memory, as with ``corrections.py``; but there is one
table row for all of them, and no site.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tables import PrimitiveTable, Segments
from .corrections import check_table
from .launch import ceil_div
from .shapes import shape_only

PLACE = (
    "Tensor cells, Tensor numbers, Tensor indices, int row, Tensor start, Tensor end, Tensor slot,"
    " Tensor weight, int max_rows, int max_inner"
)
"""The end of such an operation's schema; ``flat`` gives the values."""

PROGRAMS = 1024
"""Enough of them to fill any GPU: where a launch could have more, each takes several blocks."""

ROWS = 64
PROMPT = 2048
"""Rows of the steps that kernels are compiled for: one token of each request, or one's prompt."""


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a table, and the segments whose adapters may have a cell there.

    Attributes:
        cells: (table rows, adapter slots, fields) int64.
        numbers: The pool, as the base's dtype.
        indices: The pool, as int32.
        row: Of the table.
        start: (segments,) int32, and so on as in ``tables.Segments``.
        end: One past the last row.
        slot: Adapter slots.
        weight: float32.
        max_rows: Rows of the longest segment, as the host knows them.
        max_inner: Bound on the inner width of these adapters' cells.
    """

    cells: Tensor
    numbers: Tensor
    indices: Tensor
    row: int
    start: Tensor
    end: Tensor
    slot: Tensor
    weight: Tensor
    max_rows: int
    max_inner: int

    @property
    def num_segments(self) -> int:
        """Some may be empty."""
        return self.start.shape[0]

    @property
    def segments(self) -> dict[str, Any]:
        """The arguments by which a kernel finds a segment and its adapter's cell."""
        return {
            "cells": self.cells,
            "numbers": self.numbers,
            "seg_start": self.start,
            "seg_end": self.end,
            "seg_slot": self.slot,
            "row": self.row,
            "num_slots": self.cells.shape[1],
        }

    def parts(self, rows: int, others: int = 1) -> int:
        """Programs that share a segment's blocks of ``rows``, where ``others`` more multiply them.

        At least one, and more than that only as long as there are no more than ``PROGRAMS``.
        """
        room = PROGRAMS // max(self.num_segments * others, 1)
        return max(1, min(ceil_div(self.max_rows, rows), room))


def flat(table: PrimitiveTable, row: int, segments: Segments) -> tuple[Any, ...]:
    """The values of ``PLACE``."""
    return (
        table.cells,
        table.numbers,
        table.indices,
        row,
        segments.start,
        segments.end,
        segments.adapter_slot,
        segments.weight,
        segments.max_rows,
        segments.max_inner,
    )


def check_place(name: str, out: Tensor, table: PrimitiveTable, inputs: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``inputs`` have the shape of ``out`` and a table fits them.

    All are of one dtype, on one device and dense in their last dimension, ``out`` in all.
    """
    for each in inputs:
        require(each.shape == out.shape, f"{name}: tensors differ in shape", out, each)
        alike = each.dtype is out.dtype and each.device == out.device and each.stride(-1) == 1
        require(alike, f"{name}: tensors must be alike, with strides of 1 last", out, each)
    require(out.is_contiguous(), f"{name}: what is changed must be contiguous", out)
    check_cells(name, table, out)


def check_cells(name: str, table: PrimitiveTable, like: Tensor) -> None:
    """Raise ValueError unless a table is of the dtype of ``like``, on its device, and whole."""
    check_table(name, table, like)
    whole = table.cells.dim() == 3 and table.cells.dtype is torch.int64
    require(whole, f"{name}: cells must be (rows, slots, fields) int64", table.cells)


def require(met: bool, message: str, *tensors: Tensor) -> None:
    """Raise ValueError with a message and what the tensors are."""
    if not met:
        found = "; ".join(
            f"{tuple(each.shape)} of {each.dtype} on {each.device} with strides {each.stride()}"
            for each in tensors
        )
        raise ValueError(f"{message}: got {found}")


def production_places(dtype: torch.dtype, max_inner: int = 64) -> tuple[Place, Place]:
    """A decode step of 64 rows with an adapter each, and a prompt of 2048 rows; without memory."""
    return _production(dtype, ROWS, 1, max_inner), _production(dtype, 1, PROMPT, max_inner)


def _production(dtype: torch.dtype, segments: int, max_rows: int, max_inner: int) -> Place:
    slots, fields, pool = 256, 8, 1 << 30

    def index(*shape: int) -> Tensor:
        return shape_only(*shape, dtype=torch.int32)

    return Place(
        cells=shape_only(512, slots, fields, dtype=torch.int64),
        numbers=shape_only(pool, dtype=dtype),
        indices=index(pool),
        row=7,
        start=index(segments),
        end=index(segments),
        slot=index(segments),
        weight=shape_only(segments, dtype=torch.float32),
        max_rows=max_rows,
        max_inner=max_inner,
    )
