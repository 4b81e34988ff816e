"""The device code of ``gpu``: right, then left."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, choose, dot, dot_wide, find_cell, rounded, tensor_at, wide


@triton.jit
def times_transposed(
    left,
    right,
    left_at,
    left_mask,
    right_start,
    num_rows,
    size,
    acc,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """acc + A Bᵀ: rows of A begin at left + left_at; B (num_rows, size), from right_start on."""
    r = right_start + tl.arange(0, BLOCK_RIGHT)
    for block in range(0, size, BLOCK):
        j = block + tl.arange(0, BLOCK)
        a = tl.load(
            left + left_at[:, None] + j[None, :],
            mask=left_mask[:, None] & (j < size)[None, :],
            other=0.0,
        )
        b = tl.load(
            right + r[None, :] * size + j[:, None],
            mask=(r < num_rows)[None, :] & (j < size)[:, None],
            other=0.0,
        )
        acc = dot(a, b, acc)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def kronecker_right_kernel(
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
    out_size_0,
    out_size_1,
    out_size_2,
    out_size_3,
    FIELDS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[t, i] = X Rᵀ (m, k) over one segment and target, every so-many-th tile."""
    segment, target = tl.program_id(0), tl.program_id(1)
    out_size = choose(target, out_size_0, out_size_1, out_size_2, out_size_3)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, first + target, num_slots, tl.load(seg_slot + segment), FIELDS)
    left_rows = tl.load(cell).to(tl.int32)
    if (start < end) & (left_rows > 0):
        m, rank = tl.load(cell + 1).to(tl.int32), tl.load(cell + 2).to(tl.int32)
        n, k = in_size // m, out_size // left_rows
        right = tensor_at(numbers, cell, 4)
        # All X of a segment one below the other are a matrix of n columns.
        count = (end - start) * m
        blocks = tl.cdiv(count, BLOCK_X)
        num_tiles = blocks * tl.cdiv(k, BLOCK_K)
        for tile in range(tl.program_id(2), num_tiles, tl.num_programs(2)):
            begin, column = (tile % blocks) * BLOCK_X, (tile // blocks) * BLOCK_K
            row = begin // m
            place = begin + tl.arange(0, BLOCK_X)
            i, part, there = place // m - row, place % m, place < count
            x_rows = x + wide(start + row) * x_stride
            x_at = i * x_stride + part * n
            acc = tl.zeros((BLOCK_X, BLOCK_K), dtype=tl.float32)
            if rank == 0:
                acc = times_transposed(
                    x_rows, right, x_at, there, column, k, n, acc, BLOCK_K, BLOCK_N
                )
            else:
                up = tensor_at(numbers, cell, 5)
                c = column + tl.arange(0, BLOCK_K)
                for rank_start in range(0, rank, BLOCK_RANK):
                    low = tl.zeros((BLOCK_X, BLOCK_RANK), dtype=tl.float32)
                    low = times_transposed(
                        x_rows, right, x_at, there, rank_start, rank, n, low, BLOCK_RANK, BLOCK_N
                    )
                    r = rank_start + tl.arange(0, BLOCK_RANK)
                    u = tl.load(
                        up + c[None, :] * rank + r[:, None],
                        mask=(c < k)[None, :] & (r < rank)[:, None],
                        other=0.0,
                    )
                    acc = dot_wide(low, u, acc)
            c = column + tl.arange(0, BLOCK_K)
            h_rows = h + (wide(target) * num_rows + start + row) * max_inner
            at = h_rows + (i * max_inner + part * k)[:, None] + c[None, :]
            tl.store(at, acc, mask=there[:, None] & (c < k)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def kronecker_left_kernel(
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
    out_start_0,
    out_start_1,
    out_start_2,
    out_start_3,
    out_size_0,
    out_size_1,
    out_size_2,
    out_size_3,
    FIELDS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Y (l, k) += w L h[t, i] over one segment and target, every so-many-th tile."""
    segment, target = tl.program_id(0), tl.program_id(1)
    out_start = choose(target, out_start_0, out_start_1, out_start_2, out_start_3)
    out_size = choose(target, out_size_0, out_size_1, out_size_2, out_size_3)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, first + target, num_slots, tl.load(seg_slot + segment), FIELDS)
    left_rows = tl.load(cell).to(tl.int32)
    if (start < end) & (left_rows > 0):
        m, k = tl.load(cell + 1).to(tl.int32), out_size // left_rows
        left = tensor_at(numbers, cell, 3)
        w = tl.load(seg_weight + segment)
        # Tiles are of Yᵀ, whose columns of all rows of a segment are the columns of one product.
        count = (end - start) * k
        blocks = tl.cdiv(count, BLOCK_Y)
        num_tiles = blocks * tl.cdiv(left_rows, BLOCK_L)
        for tile in range(tl.program_id(2), num_tiles, tl.num_programs(2)):
            begin, up_start = (tile % blocks) * BLOCK_Y, (tile // blocks) * BLOCK_L
            row = begin // k
            place = begin + tl.arange(0, BLOCK_Y)
            i, part, there = place // k - row, place % k, place < count
            up = up_start + tl.arange(0, BLOCK_L)
            h_rows = h + (wide(target) * num_rows + start + row) * max_inner
            acc = tl.zeros((BLOCK_Y, BLOCK_L), dtype=tl.float32)
            for block in range(0, m, BLOCK_M):
                j = block + tl.arange(0, BLOCK_M)
                product = tl.trans(
                    tl.load(
                        h_rows + (i * max_inner + part)[None, :] + j[:, None] * k,
                        mask=there[None, :] & (j < m)[:, None],
                        other=0.0,
                    )
                )
                factor = tl.load(
                    left + up[None, :] * m + j[:, None],
                    mask=(up < left_rows)[None, :] & (j < m)[:, None],
                    other=0.0,
                )
                acc = dot_wide(product, factor, acc)
            y_rows = y + wide(start + row) * y_stride + out_start
            at = y_rows + (i * y_stride + part)[None, :] + up[:, None] * k
            mask = there[None, :] & (up < left_rows)[:, None]
            base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, rounded(base + w * tl.trans(acc), y.dtype.element_ty), mask=mask)
