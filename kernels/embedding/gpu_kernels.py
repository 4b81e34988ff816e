"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, dot, find_cell, load_optional, rounded, tensor_at, wide


@triton.jit
def place_of(token, ids, count, BLOCK: tl.constexpr):
    """The place of a token among ``count`` ascending ids, -1 where it is not among them."""
    # A search in BLOCK parts rather than two: each step waits for memory once.
    low, high = wide(0), count
    while low < high:
        step = (high - low + BLOCK - 1) // BLOCK
        last = low + (tl.arange(0, BLOCK) + 1) * step - 1  # of each part
        found = tl.load(ids + last, mask=last < high, other=0)
        below = (found < token) & (last < high)
        low += tl.sum(below.to(tl.int64), axis=0) * step
        high = tl.minimum(low + step - 1, high)
    there = tl.load(ids + low, mask=low < count, other=0)
    return tl.where((low < count) & (there == token), low, -1)


@triton.jit(do_not_specialize=COUNTS)
def replace_rows_kernel(
    x,
    ids,
    cells,
    numbers,
    indices,
    seg_start,
    seg_end,
    seg_slot,
    row,
    num_slots,
    hidden,
    FIELDS: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[i] = R[k] where ids[k] is the token of row i, for every row of a program's in a segment."""
    segment, part = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, row, num_slots, tl.load(seg_slot + segment), FIELDS)
    count = tl.load(cell)
    if (start < end) & (count > 0):
        stored = tensor_at(numbers, cell, 1)
        searched = tl.load(cell + 2) >= 0
        for i in range(start + part, end, tl.num_programs(1)):
            at = tl.load(ids + i)
            if searched:
                at = place_of(at, tensor_at(indices, cell, 2), count, SEARCH)
            if (at >= 0) & (at < count):
                for first in range(0, hidden, BLOCK):
                    k = first + tl.arange(0, BLOCK)
                    values = tl.load(stored + at * hidden + k, mask=k < hidden, other=0.0)
                    tl.store(x + wide(i) * hidden + k, values, mask=k < hidden)


@triton.jit(do_not_specialize=COUNTS)
def correct_embedding_kernel(
    x,
    ids,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    seg_weight,
    row,
    num_slots,
    hidden,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x = g * x + w A[token] B over one block of columns of a program's rows in a segment."""
    segment, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, row, num_slots, tl.load(seg_slot + segment), FIELDS)
    rank = tl.load(cell).to(tl.int32)
    if (start < end) & (rank >= 0):
        num_tokens = tl.load(cell + 1)
        a, b = tensor_at(numbers, cell, 2), tensor_at(numbers, cell, 3)
        column = block * BLOCK + tl.arange(0, BLOCK)
        g = load_optional(numbers, cell, 4, column, hidden, 1.0)
        weight = tl.load(seg_weight + segment)
        for first in range(start + part * BLOCK_ROWS, end, tl.num_programs(1) * BLOCK_ROWS):
            i = tl.arange(0, BLOCK_ROWS)
            there = i < end - first
            token = tl.load(ids + first + i, mask=there, other=0)
            known = (token >= 0) & (token < num_tokens)
            acc = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
            for rank_start in range(0, rank, BLOCK_RANK):
                r = rank_start + tl.arange(0, BLOCK_RANK)
                left = tl.load(
                    a + token[:, None] * rank + r[None, :],
                    mask=(there & known)[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    b + r[:, None] * hidden + column[None, :],
                    mask=(r < rank)[:, None] & (column < hidden)[None, :],
                    other=0.0,
                )
                if BLOCK_ROWS == 1:
                    product = tl.trans(left).to(tl.float32) * right.to(tl.float32)
                    acc += tl.sum(product, axis=0)[None, :]
                else:
                    acc = dot(left, right, acc)
            changed = tl.where(rank > 0, there & known, there)
            mask = changed[:, None] & (column < hidden)[None, :]
            at = x + wide(first) * hidden + i[:, None] * hidden + column[None, :]
            base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            result = rounded(g[None, :] * base + weight * acc, x.dtype.element_ty)
            tl.store(at, result, mask=mask)
