"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..dense.gpu_kernels import add_tile
from ..gpu.device import COUNTS, find_cell, wide


@triton.jit(do_not_specialize=COUNTS)
def add_real_kernel(
    y,
    transformed,
    cells,
    seg_start,
    seg_slot,
    place_start,
    place_end,
    table_row,
    num_slots,
    y_stride,
    out_start,
    out_size,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """y[start + p - place_start, columns] += Re transformed[p], p in one segment's places."""
    segment, column = tl.program_id(0), tl.program_id(1) * BLOCK_OUT
    first, end = tl.load(place_start + segment), tl.load(place_end + segment)
    cell = find_cell(cells, table_row, num_slots, tl.load(seg_slot + segment), FIELDS)
    if (first < end) & (tl.load(cell) >= 0):
        start = tl.load(seg_start + segment)
        i, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT)
        blocks = tl.cdiv(end - first, BLOCK_ROWS)
        for block in range(tl.program_id(2), blocks, tl.num_programs(2)):
            row = block * BLOCK_ROWS
            there = (i < end - first - row)[:, None] & (c < out_size - column)[None, :]
            rows = transformed + (wide(first + row) * out_size + column) * 2
            real = tl.load(rows + (i[:, None] * out_size + c[None, :]) * 2, mask=there, other=0.0)
            add_tile(
                y + wide(start + row) * y_stride + out_start + column,
                real,
                y_stride,
                end - first - row,
                out_size - column,
                BLOCK_ROWS,
                BLOCK_OUT,
            )
