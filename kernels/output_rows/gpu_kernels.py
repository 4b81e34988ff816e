"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..dense.gpu_kernels import times_rows
from ..gpu.device import COUNTS, choose, find_cell, rounded, tensor_at, wide


@triton.jit(do_not_specialize=COUNTS)
def output_rows_kernel(
    y,
    x,
    cells,
    numbers,
    indices,
    seg_start,
    seg_end,
    seg_slot,
    first,
    num_slots,
    in_size,
    x_stride,
    y_stride,
    out_start_0,
    out_start_1,
    out_start_2,
    out_start_3,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """y[:, index_k] = x . W_k over one segment and target, every so-many-th tile of rows and k."""
    segment, target = tl.program_id(0), tl.program_id(1)
    out_start = choose(target, out_start_0, out_start_1, out_start_2, out_start_3)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, first + target, num_slots, tl.load(seg_slot + segment), FIELDS)
    count = tl.load(cell).to(tl.int32)
    if (start < end) & (count > 0):
        index = tensor_at(indices, cell, 1)
        weight = tensor_at(numbers, cell, 2)
        i, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT)
        row_blocks = tl.cdiv(end - start, BLOCK_ROWS)
        num_tiles = row_blocks * tl.cdiv(count, BLOCK_OUT)
        for tile in range(tl.program_id(2), num_tiles, tl.num_programs(2)):
            row = start + (tile % row_blocks) * BLOCK_ROWS
            begin = (tile // row_blocks) * BLOCK_OUT
            product = times_rows(
                x + wide(row) * x_stride,
                weight + wide(begin) * in_size,
                x_stride,
                in_size,
                end - row,
                count - begin,
                BLOCK_ROWS,
                BLOCK_OUT,
                BLOCK_IN,
            )
            column = tl.load(index + begin + c, mask=c < count - begin, other=0)
            at = y + wide(row) * y_stride + out_start + i[:, None] * y_stride + column[None, :]
            mask = (i < end - row)[:, None] & (c < count - begin)[None, :]
            tl.store(at, rounded(product, y.dtype.element_ty), mask=mask)
