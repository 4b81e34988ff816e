"""The device code of ``gpu``. A span is as many whole blocks as a tile is wide, or one block."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, dot_wide, find_cell, load_optional, rounded, tensor_at, wide


@triton.jit
def permuted(p, permutes, column, size):
    """p[column], or ``column`` where there is no permutation; 0 for columns beyond ``size``."""
    found = tl.load(p + column, mask=column < tl.where(permutes, size, 0), other=0)
    return tl.where(column < tl.where(permutes, 0, size), column, found)


@triton.jit
def by_matrix(
    z,
    z_stride,
    num_rows,
    p,
    permutes,
    r,
    first,
    last,
    column,
    size,
    block,
    num_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """These columns of z[:, p] R, R block-diagonal, whose rows are those of one span."""
    i = tl.arange(0, BLOCK_ROWS)
    acc = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        source = permuted(p, permutes, row, size)
        left = tl.load(
            z + i[:, None] * z_stride + source[None, :],
            mask=(i < num_rows)[:, None] & (row < last)[None, :],
            other=0.0,
        )
        stored = tl.where(num_blocks == 1, 0, row // block)
        same = (row // block)[:, None] == (column // block)[None, :]
        right = tl.load(
            r + ((stored * block + row % block) * block)[:, None] + (column % block)[None, :],
            mask=same & (row < last)[:, None] & (column < last)[None, :],
            other=0.0,
        )
        acc = dot_wide(left, right, acc)
    return acc


@triton.jit
def by_column(
    z,
    p,
    permutes,
    r,
    last,
    column,
    size,
    block,
    num_blocks,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """These columns of z[p] R for one row, each the sum over its own block."""
    which = column // block
    stored = tl.where(num_blocks == 1, 0, which)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, block, DEPTH):
        i = (start + tl.arange(0, DEPTH))[:, None]
        mask = (i < block) & (column < last)[None, :]
        source = permuted(p, permutes, (which * block)[None, :] + i, size)
        left = tl.load(z + source, mask=mask, other=0.0)
        at = (stored * block)[None, :] + i
        right = tl.load(r + at * block + (column % block)[None, :], mask=mask, other=0.0)
        acc += tl.sum(left * right.to(tl.float32), axis=0)
    return acc[None, :]


@triton.jit(do_not_specialize=COUNTS)
def transform_input_kernel(
    x,
    scratch,
    cells,
    numbers,
    indices,
    seg_start,
    seg_end,
    seg_slot,
    row,
    num_slots,
    num_rows,
    size,
    x_stride,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- s * x, then every stage's rotations, over a program's rows and spans of a segment."""
    segment, part, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, row, num_slots, tl.load(seg_slot + segment), FIELDS)
    stages = tl.load(cell).to(tl.int32)
    # Between stages columns move from span to span, so that one program has to have them all.
    shares = tl.where(stages <= 1, tl.num_programs(2), 1)
    if (start < end) & (stages >= 0) & (share < shares):
        num_blocks = tl.load(cell + 1).to(tl.int32)
        block = tl.where(stages == 0, 1, tl.load(cell + 2).to(tl.int32))
        span = tl.maximum(BLOCK // block, 1) * block
        permutes = tl.load(cell + 4) >= 0
        rotations, order = tensor_at(numbers, cell, 3), tensor_at(indices, cell, 4)
        plane = wide(num_rows) * size
        i = tl.arange(0, BLOCK_ROWS)
        for top in range(start + part * BLOCK_ROWS, end, tl.num_programs(1) * BLOCK_ROWS):
            rows, there = end - top, (i < end - top)[:, None]
            x_rows, z_rows = x + wide(top) * x_stride, scratch + wide(top) * size
            for first in range(share * span, size, shares * span):
                last = tl.minimum(first + span, size)
                for begin in range(first, last, BLOCK):
                    column = begin + tl.arange(0, BLOCK)
                    mask = there & (column < last)[None, :]
                    c = permuted(order, permutes, column, size)
                    at = x_rows + i[:, None] * x_stride + c[None, :]
                    s = load_optional(numbers, cell, 5, c, size, 1.0)
                    scaled = tl.load(at, mask=mask, other=0.0).to(tl.float32) * s[None, :]
                    if stages == 0:
                        tl.store(at, rounded(scaled, x.dtype.element_ty), mask=mask)
                    else:
                        tl.store(z_rows + i[:, None] * size + c[None, :], scaled, mask=mask)
            for stage in range(stages):
                tl.debug_barrier()  # what other threads of this program wrote is read now
                z = z_rows + (stage % 2) * plane
                out = z_rows + ((stage + 1) % 2) * plane
                p = order + wide(stage) * size
                r = rotations + wide(stage) * num_blocks * block * block
                for first in range(share * span, size, shares * span):
                    last = tl.minimum(first + span, size)
                    for begin in range(first, last, BLOCK):
                        column = begin + tl.arange(0, BLOCK)
                        mask = there & (column < last)[None, :]
                        if BLOCK_ROWS == 1:
                            acc = by_column(
                                z,
                                p,
                                permutes,
                                r,
                                last,
                                column,
                                size,
                                block,
                                num_blocks,
                                DEPTH,
                                BLOCK,
                            )
                        else:
                            acc = by_matrix(
                                z,
                                size,
                                rows,
                                p,
                                permutes,
                                r,
                                first,
                                last,
                                column,
                                size,
                                block,
                                num_blocks,
                                BLOCK_ROWS,
                                BLOCK,
                            )
                        c = permuted(p, permutes, column, size)
                        if stage == stages - 1:
                            at = x_rows + i[:, None] * x_stride + c[None, :]
                            tl.store(at, rounded(acc, x.dtype.element_ty), mask=mask)
                        else:
                            tl.store(out + i[:, None] * size + c[None, :], acc, mask=mask)
