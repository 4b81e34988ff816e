"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..dense.gpu_kernels import add_tile
from ..gpu.device import COUNTS, choose, dot, find_cell, tensor_at, wide


@triton.jit
def times_circulant(
    x,
    kernel,
    column,
    b,
    x_stride,
    in_size,
    out_size,
    num_rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Columns from ``column`` on of sum_n sum_q K[m, n, (q - p) mod b] x_n[q], in float32."""
    # Input k is q of block n, column c is p of block m. In K (m, n, :) begins at m in + n b, and
    # n b = k - q: the expanded matrix exists in registers only.
    i, c = tl.arange(0, BLOCK_ROWS), column + tl.arange(0, BLOCK_OUT)
    p, block_row = c % b, kernel + (c // b) * in_size
    if BLOCK_ROWS == 1:
        terms = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        for block in range(0, in_size, BLOCK_IN):
            k = block + tl.arange(0, BLOCK_IN)
            q = k % b
            turn = q[None, :] - p[:, None]
            left = tl.load(x + k, mask=k < in_size, other=0.0)
            right = tl.load(
                block_row[:, None] + (k - q)[None, :] + tl.where(turn < 0, turn + b, turn),
                mask=(c < out_size)[:, None] & (k < in_size)[None, :],
                other=0.0,
            )
            terms += left.to(tl.float32)[None, :] * right.to(tl.float32)
        product = tl.sum(terms, axis=1)[None, :]
    else:
        product = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        for block in range(0, in_size, BLOCK_IN):
            k = block + tl.arange(0, BLOCK_IN)
            q = k % b
            turn = q[:, None] - p[None, :]
            left = tl.load(
                x + i[:, None] * x_stride + k[None, :],
                mask=(i < num_rows)[:, None] & (k < in_size)[None, :],
                other=0.0,
            )
            right = tl.load(
                block_row[None, :] + (k - q)[:, None] + tl.where(turn < 0, turn + b, turn),
                mask=(c < out_size)[None, :] & (k < in_size)[:, None],
                other=0.0,
            )
            product = dot(left, right, product)
    return product


@triton.jit(do_not_specialize=COUNTS)
def circulant_kernel(
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
    """y_m[p] += w sum_n sum_q K[m, n, (q - p) mod b] x_n[q], every so-many-th tile of y."""
    segment, target = tl.program_id(0), tl.program_id(1)
    out_start = choose(target, out_start_0, out_start_1, out_start_2, out_start_3)
    out_size = choose(target, out_size_0, out_size_1, out_size_2, out_size_3)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, first + target, num_slots, tl.load(seg_slot + segment), FIELDS)
    b = tl.load(cell).to(tl.int32)
    if (start < end) & (b > 0):
        kernel = tensor_at(numbers, cell, 1)
        w = tl.load(seg_weight + segment)
        row_blocks = tl.cdiv(end - start, BLOCK_ROWS)
        num_tiles = row_blocks * tl.cdiv(out_size, BLOCK_OUT)
        for tile in range(tl.program_id(2), num_tiles, tl.num_programs(2)):
            row = start + (tile % row_blocks) * BLOCK_ROWS
            column = (tile // row_blocks) * BLOCK_OUT
            product = times_circulant(
                x + wide(row) * x_stride,
                kernel,
                column,
                b,
                x_stride,
                in_size,
                out_size,
                end - row,
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
