"""The device code of ``gpu``: shrink and expand."""

import triton
import triton.language as tl

from ..gpu.device import (
    COUNTS,
    choose,
    dot,
    dot_wide,
    find_cell,
    optional_at,
    rounded,
    tensor_at,
    wide,
)


@triton.jit(do_not_specialize=COUNTS)
def shrink_kernel(
    h,
    x,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    first,
    num_slots,
    in_size,
    x_stride,
    num_rows,
    max_inner,
    parts,
    FIELDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """h[split, t, i, :] = A[:, k in split] x[i, k in split] for one segment, target and split."""
    segment, target, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part, place = place % parts, place // parts
    split, rank_start = place % SPLITS, (place // SPLITS) * BLOCK_RANK
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    slot = tl.load(seg_slot + segment)
    if start < end:  # a padded step has many programs without rows, which end here
        cell = find_cell(cells, first + target, num_slots, slot, FIELDS)
        # All fields at once: one wait for memory, where a load behind a branch is another.
        rank, a = tl.load(cell).to(tl.int32), tensor_at(numbers, cell, 1)
        if rank_start < rank:
            r = rank_start + tl.arange(0, BLOCK_RANK)
            plane = h + wide(split * tl.num_programs(1) + target) * num_rows * max_inner
            for row in range(start + part * BLOCK_ROWS, end, parts * BLOCK_ROWS):
                i = tl.arange(0, BLOCK_ROWS)
                there = i < end - row
                x_rows = x + wide(row) * x_stride
                acc = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
                terms = tl.zeros((BLOCK_IN if BLOCK_ROWS == 1 else 1, BLOCK_RANK), dtype=tl.float32)
                for block in range(split * BLOCK_IN, in_size, SPLITS * BLOCK_IN):
                    k = block + tl.arange(0, BLOCK_IN)
                    left = tl.load(
                        x_rows + i[:, None] * x_stride + k[None, :],
                        mask=there[:, None] & (k < in_size)[None, :],
                        other=0.0,
                    )
                    right = tl.load(
                        a + r[None, :] * in_size + k[:, None],
                        mask=(r < rank)[None, :] & (k < in_size)[:, None],
                        other=0.0,
                    )
                    if BLOCK_ROWS == 1:
                        terms += tl.trans(left).to(tl.float32) * right.to(tl.float32)
                    else:
                        acc = dot(left, right, acc)
                if BLOCK_ROWS == 1:
                    acc = tl.sum(terms, axis=0)[None, :]
                h_rows = plane + wide(row) * max_inner
                at = h_rows + i[:, None] * max_inner + r[None, :]
                # Whole blocks, with zeros behind the rank: expand reads vectors of them.
                found = tl.where((r < rank)[None, :], acc, 0.0)
                tl.store(at, found, mask=there[:, None] & (r < max_inner)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def expand_kernel(
    y,
    h,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    seg_weight,
    first,
    num_slots,
    y_stride,
    num_rows,
    max_inner,
    num_targets,
    parts,
    out_start_0,
    out_start_1,
    out_start_2,
    out_start_3,
    out_size_0,
    out_size_1,
    out_size_2,
    out_size_3,
    FIELDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PLANES: tl.constexpr,
):
    """y = g * y + w (h B + c) over one segment, target and block of columns."""
    segment, target, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part, block = block % parts, block // parts
    out_start = choose(target, out_start_0, out_start_1, out_start_2, out_start_3)
    out_size = choose(target, out_size_0, out_size_1, out_size_2, out_size_3)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    slot, weight = tl.load(seg_slot + segment), tl.load(seg_weight + segment)
    if (start < end) & (block * BLOCK_OUT < out_size):
        cell = find_cell(cells, first + target, num_slots, slot, FIELDS)
        rank, b = tl.load(cell).to(tl.int32), tensor_at(numbers, cell, 2)
        bias, scale = tl.load(cell + 3), tl.load(cell + 4)
        if rank >= 0:
            column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            inside = column < out_size
            c = optional_at(numbers, bias, column, out_size, 0.0)
            g = optional_at(numbers, scale, column, out_size, 1.0)
            plane_size = wide(num_rows) * max_inner
            for row in range(start + part * BLOCK_ROWS, end, parts * BLOCK_ROWS):
                i = tl.arange(0, BLOCK_ROWS)
                there = i < end - row
                y_rows = y + wide(row) * y_stride + out_start
                at = y_rows + i[:, None] * y_stride + column[None, :]
                mask = there[:, None] & inside[None, :]
                base = tl.load(at, mask=mask, other=0.0)
                h_rows = h + target * plane_size + wide(row) * max_inner
                acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
                for rank_start in range(0, rank, BLOCK_RANK):
                    r = rank_start + tl.arange(0, BLOCK_RANK)
                    left = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
                    for first_plane in range(0, SPLITS, PLANES):
                        # Side by side: one after another they would wait for each other.
                        split = first_plane + tl.arange(0, PLANES)
                        away = (i[:, None] * max_inner + r[None, :])[None, :, :]
                        planes = tl.load(
                            h_rows + (split * num_targets * plane_size)[:, None, None] + away,
                            mask=(split < SPLITS)[:, None, None]
                            & (there[:, None] & (r < max_inner)[None, :])[None, :, :],
                            other=0.0,
                        )
                        left += tl.sum(planes, axis=0)
                    right = tl.load(
                        b + r[:, None] * out_size + column[None, :],
                        mask=(r < rank)[:, None] & inside[None, :],
                        other=0.0,
                    )
                    if BLOCK_ROWS == 1:
                        product = tl.trans(left) * right.to(tl.float32)
                        acc += tl.sum(product, axis=0)[None, :]
                    else:
                        acc = dot_wide(left, right, acc)
                result = g[None, :] * base.to(tl.float32) + weight * (acc + c[None, :])
                tl.store(at, rounded(result, y.dtype.element_ty), mask=mask)
