"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..dense.gpu_kernels import add_tile
from ..gpu.device import COUNTS, choose, find_cell, tensor_at, wide


@triton.jit
def times_entries(
    x,
    row_starts,
    columns,
    values,
    x_stride,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """x Sᵀ in float32, of up to BLOCK_ROWS rows of x and the first BLOCK_OUT rows of S."""
    i, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT)
    begin = tl.load(row_starts + c, mask=c < num_columns, other=0)
    end = tl.load(row_starts + c + 1, mask=c < num_columns, other=0)
    longest = tl.max(end - begin, axis=0)
    terms = tl.zeros((BLOCK_ROWS, BLOCK_OUT, BLOCK_ENTRIES), dtype=tl.float32)
    for block in range(0, longest, BLOCK_ENTRIES):
        entry = begin[:, None] + block + tl.arange(0, BLOCK_ENTRIES)[None, :]
        there = entry < end[:, None]
        k = tl.load(columns + entry, mask=there, other=0)
        value = tl.load(values + entry, mask=there, other=0.0).to(tl.float32)
        gathered = tl.load(
            x + i[:, None, None] * x_stride + k[None, :, :],
            mask=(i < num_rows)[:, None, None] & there[None, :, :],
            other=0.0,
        )
        terms += gathered.to(tl.float32) * value[None, :, :]
    return tl.sum(terms, axis=2)


@triton.jit(do_not_specialize=COUNTS)
def sparse_kernel(
    y,
    x,
    cells,
    numbers,
    indices,
    seg_start,
    seg_end,
    seg_slot,
    seg_weight,
    first,
    num_slots,
    x_stride,
    y_stride,
    out_start_0,
    out_start_1,
    out_start_2,
    out_start_3,
    out_size_0,
    out_size_1,
    out_size_2,
    out_size_3,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """y += w x Sᵀ over one segment and target, every so-many-th tile."""
    segment, target = tl.program_id(0), tl.program_id(1)
    out_start = choose(target, out_start_0, out_start_1, out_start_2, out_start_3)
    out_size = choose(target, out_size_0, out_size_1, out_size_2, out_size_3)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, first + target, num_slots, tl.load(seg_slot + segment), FIELDS)
    if (start < end) & (tl.load(cell) >= 0):
        row_starts = tensor_at(indices, cell, 1)
        columns = tensor_at(indices, cell, 2)
        values = tensor_at(numbers, cell, 3)
        w = tl.load(seg_weight + segment)
        row_blocks = tl.cdiv(end - start, BLOCK_ROWS)
        num_tiles = row_blocks * tl.cdiv(out_size, BLOCK_OUT)
        for tile in range(tl.program_id(2), num_tiles, tl.num_programs(2)):
            row = start + (tile % row_blocks) * BLOCK_ROWS
            column = (tile // row_blocks) * BLOCK_OUT
            product = times_entries(
                x + wide(row) * x_stride,
                row_starts + column,
                columns,
                values,
                x_stride,
                end - row,
                out_size - column,
                BLOCK_ROWS,
                BLOCK_OUT,
                BLOCK_ENTRIES,
            )
            add_tile(
                y + wide(row) * y_stride + out_start + column,
                w * product,
                y_stride,
                end - row,
                out_size - column,
                BLOCK_ROWS,
                BLOCK_OUT,
            )
