"""add_spectral on a GPU: transforms by torch between a gather, add_sparse and a last addition.

Every row that is in a segment is transformed, whether its adapter has a cell here or not: only the
device knows. So the shapes are those of ``Segments.rows``, a captured step serves later batches,
and nothing is asked of the device. What has no cell is neither multiplied nor written. Rows pass
through memory in float32 a few times; blocks of them keep what that takes in bounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..gpu.corrections import check_rows, check_table, production_site
from ..gpu.launch import Launch, ceil_div
from ..gpu.registry import register
from ..gpu.shapes import Shapes, shape_only
from ..sparse.gpu import CONFIGS
from ..sparse.gpu import launches as sparse_launches
from ..tables import CorrectLinear, PrimitiveTable, Segments, SiteTargets
from .gpu_kernels import add_real_kernel
from .op import Cell

BLOCK = 1024
"""Rows that are transformed at once."""

_TILE_ROWS, _TILE_OUT, _MAX_ROW_PROGRAMS = 4, 256, 32


def add_real_launch(
    y: Tensor,
    transformed: Tensor,
    cells: Tensor,
    table_row: int,
    start: Tensor,
    place_start: Tensor,
    place_end: Tensor,
    slot: Tensor,
    max_rows: int,
    out_start: int,
) -> Launch:
    """y[rows, columns] += Re transformed[places] for every segment that has a cell.

    Args:
        y: (rows, out), changed in place.
        transformed: (places, width, 2) float32, real and imaginary parts.
        cells: (table rows, adapter slots, fields) int64.
        table_row: Of the target.
        start: (segments,) the row of y that is at ``place_start``.
        place_start: (segments,) first place of each.
        place_end: (segments,) one past the last.
        slot: (segments,) int32.
        max_rows: Places of the longest segment.
        out_start: First column of the target.
    """
    width = transformed.shape[1]
    row_programs = min(ceil_div(max_rows, _TILE_ROWS), _MAX_ROW_PROGRAMS)
    return Launch(
        add_real_kernel,
        (start.shape[0], ceil_div(width, _TILE_OUT), row_programs),
        {
            "y": y,
            "transformed": transformed,
            "cells": cells,
            "seg_start": start,
            "seg_slot": slot,
            "place_start": place_start,
            "place_end": place_end,
            "table_row": table_row,
            "num_slots": cells.shape[1],
            "y_stride": y.stride(0),
            "out_start": out_start,
            "out_size": width,
        },
        {"FIELDS": len(Cell._fields), "BLOCK_ROWS": _TILE_ROWS, "BLOCK_OUT": _TILE_OUT},
    )


def _run(*operands: Any) -> None:
    add_real_launch(*operands).run()


_add_real = register(
    "add_spectral_real(Tensor(a!) y, Tensor transformed, Tensor cells, int table_row, Tensor start,"
    " Tensor place_start, Tensor place_end, Tensor slot, int max_rows, int out_start) -> ()",
    _run,
)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a batch that are transformed at once.

    Attributes:
        rows: (places,) their places in the batch.
        start: (segments,) row of the batch at each segment's first place.
        first: (segments,) that place, 0 ... places.
        end: (segments,) one past its last.
        max_rows: Places of the longest segment.
    """

    rows: Tensor
    start: Tensor
    first: Tensor
    end: Tensor
    max_rows: int


class SpectralCorrection:
    """y[i:j, columns(t)] += w Re(ifft(S(t, s) ifft(x[i:j]))), transformed in float32."""

    def __init__(self, add_sparse: CorrectLinear) -> None:
        """Multiply by S with ``add_sparse``, given float32 rows whatever the pool's dtype."""
        self._add_sparse = add_sparse

    def __call__(
        self,
        y: Tensor,
        x: Tensor,
        table: PrimitiveTable,
        targets: SiteTargets,
        segments: Segments,
    ) -> None:
        """See ``op``; ``segments.rows`` has each segment's rows in their order, then any others.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
        """
        check_rows("add_spectral", y, x)
        check_table("add_spectral", table, y)
        for block in _blocks(segments):
            sums = self._sums(y, x, table, targets, segments, block)
            columns = zip(targets.out_starts, targets.out_sizes, strict=True)
            for position, (first, width) in enumerate(columns):
                transformed = torch.fft.ifft(sums[:, first : first + width])
                _add_real(
                    y,
                    torch.view_as_real(transformed),
                    table.cells,
                    targets.first + position,
                    block.start,
                    block.first,
                    block.end,
                    segments.adapter_slot,
                    block.max_rows,
                    first,
                )

    def _sums(
        self,
        y: Tensor,
        x: Tensor,
        table: PrimitiveTable,
        targets: SiteTargets,
        segments: Segments,
        block: _Block,
    ) -> Tensor:
        """w S(t, s) ifft(x), (places, out) complex, 0 where there is no cell."""
        frequencies = torch.fft.ifft(x[block.rows].float())
        # S is real: real and imaginary parts are rows of their own, one after the other.
        parts = torch.stack((frequencies.real, frequencies.imag), dim=1).flatten(0, 1)
        sums = torch.zeros((parts.shape[0], y.shape[1]), dtype=torch.float32, device=y.device)
        spread = replace(
            segments, start=2 * block.first, end=2 * block.end, max_rows=2 * block.max_rows
        )
        self._add_sparse(sums, parts, table, targets, spread)
        return torch.complex(sums[::2], sums[1::2])


def _blocks(segments: Segments) -> Iterator[_Block]:
    length = (segments.end - segments.start).clamp(min=0)
    end = length.cumsum(0, dtype=torch.int32)
    first = end - length
    for begin in range(0, segments.rows.shape[0], BLOCK):
        rows = segments.rows[begin : begin + BLOCK]
        count = len(rows)
        here = (first - begin).clamp(0, count)
        # A transform's plan is kept for each number of rows: few, so that none is thrown out while
        # a captured step still uses it. Row 0 stands behind, in no segment.
        padding = (1 << (count - 1).bit_length()) - count
        yield _Block(
            functional.pad(rows, (0, padding)),
            segments.start + here - (first - begin),
            here,
            (end - begin).clamp(0, count),
            min(segments.max_rows, count),
        )


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """The launches of every configuration at the site with the most targets of a base."""
    site = production_site(shapes, dtype)
    rows = replace(
        site,
        y=shape_only(*site.y.shape, dtype=torch.float32),
        x=shape_only(*site.x.shape, dtype=torch.float32),
    )
    for config in range(len(CONFIGS)):
        yield from sparse_launches(rows, config)
    for position, (first, width) in enumerate(zip(site.out_starts, site.out_sizes, strict=True)):
        yield add_real_launch(
            site.y,
            shape_only(site.y.shape[0], width, 2, dtype=torch.float32),
            site.cells,
            site.first + position,
            site.start,
            site.start,
            site.end,
            site.slot,
            site.max_rows,
            first,
        )
