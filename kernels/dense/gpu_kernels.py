"""The device code of ``gpu``, and the tiles that other corrections share with it."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, choose, dot, find_cell, rounded, tensor_at, wide


@triton.jit
def times_rows(
    x,
    weight,
    x_stride,
    in_size,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """x Wᵀ in float32, of up to BLOCK_ROWS rows of x (in) and BLOCK_OUT rows of W (in)."""
    i, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT)
    if BLOCK_ROWS == 1:
        # Summed over the inputs once, at the end: between threads that costs more than a product.
        terms = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        for block in range(0, in_size, BLOCK_IN):
            k = block + tl.arange(0, BLOCK_IN)
            left = tl.load(x + k, mask=k < in_size, other=0.0)
            right = tl.load(
                weight + c[:, None] * in_size + k[None, :],
                mask=(c < num_columns)[:, None] & (k < in_size)[None, :],
                other=0.0,
            )
            terms += left.to(tl.float32)[None, :] * right.to(tl.float32)
        product = tl.sum(terms, axis=1)[None, :]
    else:
        product = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        for block in range(0, in_size, BLOCK_IN):
            k = block + tl.arange(0, BLOCK_IN)
            left = tl.load(
                x + i[:, None] * x_stride + k[None, :],
                mask=(i < num_rows)[:, None] & (k < in_size)[None, :],
                other=0.0,
            )
            right = tl.load(
                weight + c[None, :] * in_size + k[:, None],
                mask=(c < num_columns)[None, :] & (k < in_size)[:, None],
                other=0.0,
            )
            product = dot(left, right, product)
    return product


@triton.jit
def add_tile(
    y,
    delta,
    y_stride,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """y += delta over a tile, rounded once."""
    i, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT)
    at = y + i[:, None] * y_stride + c[None, :]
    mask = (i < num_rows)[:, None] & (c < num_columns)[None, :]
    base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, rounded(base + delta, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def dense_kernel(
    y,
    x,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    seg_weight,
    first,
    num_slots,
    in_size,
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
    BLOCK_IN: tl.constexpr,
):
    """y += w x Dᵀ over one segment and target, every so-many-th tile."""
    segment, target = tl.program_id(0), tl.program_id(1)
    out_start = choose(target, out_start_0, out_start_1, out_start_2, out_start_3)
    out_size = choose(target, out_size_0, out_size_1, out_size_2, out_size_3)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, first + target, num_slots, tl.load(seg_slot + segment), FIELDS)
    if (start < end) & (tl.load(cell) >= 0):
        d = tensor_at(numbers, cell, 0)
        w = tl.load(seg_weight + segment)
        row_blocks = tl.cdiv(end - start, BLOCK_ROWS)
        num_tiles = row_blocks * tl.cdiv(out_size, BLOCK_OUT)
        for tile in range(tl.program_id(2), num_tiles, tl.num_programs(2)):
            row = start + (tile % row_blocks) * BLOCK_ROWS
            column = (tile // row_blocks) * BLOCK_OUT
            product = times_rows(
                x + wide(row) * x_stride,
                d + wide(column) * in_size,
                x_stride,
                in_size,
                end - row,
                out_size - column,
                BLOCK_ROWS,
                BLOCK_OUT,
                BLOCK_IN,
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
