"""The device code of ``gpu``: writing the cache, and attention over it."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, dot, dot_wide, rounded, wide

LOWEST = tl.constexpr(-1e30)
"""Below every score, yet finite: 2^(-inf - LOWEST) is 0 where 2^(-inf + inf) were NaN."""


@triton.jit(do_not_specialize=COUNTS)
def write_kv_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cache[slot // block_size, :, slot % block_size] = key[row] for one row, and the value."""
    row = tl.program_id(0)
    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = element < kv_heads * HEAD_DIM
        head, d = element // HEAD_DIM, element % HEAD_DIM
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        place = block * BLOCK_STRIDE + offset * HEAD_DIM
        at = head * (BLOCK_SIZE * HEAD_DIM) + d
        found = tl.load(key + wide(row) * key_stride + head * key_head_stride + d, mask=inside)
        tl.store(key_cache + place + at, found, mask=inside)
        found = tl.load(
            value + wide(row) * value_stride + head * value_head_stride + d, mask=inside
        )
        tl.store(value_cache + place + at, found, mask=inside)


@triton.jit
def attend(
    query,
    low,
    high,
    first,
    end,
    key_cache,
    value_cache,
    table,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """m = max_j s_j, l = sum_j 2^(s_j - m) and sum_j 2^(s_j - m) v_j over low <= j <= high.

    s_j = scale_log2 q . k_j; of the sequence's keys, first .. end are read and no others.
    """
    kv_head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for block in range(first // BLOCK_K * BLOCK_K, end, BLOCK_K):
        j = block + tl.arange(0, BLOCK_K)
        there = (j >= first) & (j < end)
        physical = tl.load(table + j // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        place = physical * BLOCK_STRIDE + (kv_head * BLOCK_SIZE + j % BLOCK_SIZE) * HEAD_DIM
        at = place[:, None] + d[None, :]
        mask = there[:, None] & (d < HEAD_DIM)[None, :]
        keys = tl.load(key_cache + at, mask=mask, other=0.0)
        scores = dot(query, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32))
        visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fading = tl.exp2(highest - higher)
        total = total * fading + tl.sum(weights, axis=1)
        values = tl.load(value_cache + at, mask=mask, other=0.0)
        acc = dot_wide(weights, values, acc * fading[:, None], BOUNDED=True)
        highest = higher
    return highest, total, acc


@triton.jit
def divided(acc, total):
    """acc / total, and 0 where there was nothing to see."""
    return acc / tl.where(total == 0, 1.0, total)


@triton.jit
def find_sequence(cu_seqlens_q, num_sequences, block, BLOCK_Q: tl.constexpr):
    """The last sequence i with cu_seqlens_q[i] // BLOCK_Q + i <= block."""
    # From one of these first blocks to the next there are enough for the sequence's rows, and the
    # host knows how many there are of all sequences without knowing where each begins.
    found = tl.full((), 0, tl.int32)
    above = found + num_sequences
    while above - found > 1:
        middle = (found + above) // 2
        before = tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle <= block
        found = tl.where(before, middle, found)
        above = tl.where(before, above, middle)
    return found


@triton.jit(do_not_specialize=COUNTS)
def chunk_kernel(
    out,
    query,
    key_cache,
    value_cache,
    cu_seqlens_q,
    context_starts,
    context_lens,
    block_tables,
    query_stride,
    query_head_stride,
    table_stride,
    num_sequences,
    window,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """o_i of up to BLOCK_Q rows of one sequence and the query heads of one KV head."""
    # The last rows of a chunk see the most keys: theirs are the programs that start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = find_sequence(cu_seqlens_q, num_sequences, block, BLOCK_Q)
    start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - start
    q_first = (block - start // BLOCK_Q - sequence) * BLOCK_Q
    if q_first < q_len:
        q_rows = tl.minimum(BLOCK_Q, q_len - q_first)
        hi = tl.load(context_lens + sequence) - q_len + q_first
        lo = tl.load(context_starts + sequence)
        m_row = tl.arange(0, BLOCK_M)
        i, head = m_row // GROUP, tl.program_id(1) * GROUP + m_row % GROUP
        d = tl.arange(0, BLOCK_D)
        mask = (i < q_rows)[:, None] & (d < HEAD_DIM)[None, :]
        at = i * query_stride + head * query_head_stride
        q_rows_at = query + wide(start + q_first) * query_stride
        q = tl.load(q_rows_at + at[:, None] + d[None, :], mask=mask, other=0.0)
        _, total, acc = attend(
            q,
            tl.maximum(lo, hi + i - window + 1),
            hi + i,
            tl.maximum(lo, hi - window + 1),
            hi + q_rows,
            key_cache,
            value_cache,
            block_tables + wide(sequence) * table_stride,
            scale_log2,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_STRIDE,
            BLOCK_M,
            BLOCK_K,
            BLOCK_D,
        )
        heads = tl.num_programs(1) * GROUP
        out_rows = out + wide(start + q_first) * heads * HEAD_DIM
        at = (i * heads + head) * HEAD_DIM
        result = rounded(divided(acc, total[:, None]), out.dtype.element_ty)
        tl.store(out_rows + at[:, None] + d[None, :], result, mask=mask)


@triton.jit
def find_splits(
    sequence, context_starts, context_lens, window, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The first key of a decode row, one past its last, where splits begin, and keys of each."""
    end = tl.load(context_lens + sequence)
    first = tl.maximum(tl.load(context_starts + sequence), end - window)
    begin = first // BLOCK_K * BLOCK_K
    size = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BLOCK_K) * BLOCK_K
    return first, end, begin, size


@triton.jit(do_not_specialize=COUNTS)
def decode_kernel(
    out,
    sums,
    maxima,
    totals,
    query,
    key_cache,
    value_cache,
    cu_seqlens_q,
    context_starts,
    context_lens,
    block_tables,
    query_stride,
    query_head_stride,
    table_stride,
    window,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """m, l and sum_j 2^(s_j - m) v_j of one sequence's only row over one split of its keys."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(cu_seqlens_q + sequence)
    if row < tl.load(cu_seqlens_q + sequence + 1):
        first, end, begin, size = find_splits(
            sequence, context_starts, context_lens, window, SPLITS, BLOCK_K
        )
        begin += split * size
        split_first, split_end = tl.maximum(first, begin), tl.minimum(end, begin + size)
        i, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        head = kv_head * GROUP + i
        mask = (i < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        q_row = query + wide(row) * query_stride
        at = head[:, None] * query_head_stride + d[None, :]
        highest, total, acc = attend(
            tl.load(q_row + at, mask=mask, other=0.0),
            tl.zeros((BLOCK_M,), dtype=tl.int32) + split_first,
            tl.zeros((BLOCK_M,), dtype=tl.int32) + (split_end - 1),
            split_first,
            split_end,
            key_cache,
            value_cache,
            block_tables + wide(sequence) * table_stride,
            scale_log2,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_STRIDE,
            BLOCK_M,
            BLOCK_K,
            BLOCK_D,
        )
        place = wide(row) * (tl.num_programs(1) * GROUP)
        if SPLITS == 1:
            result = rounded(divided(acc, total[:, None]), out.dtype.element_ty)
            at = head[:, None] * HEAD_DIM + d[None, :]
            tl.store(out + place * HEAD_DIM + at, result, mask=mask)
        elif begin < end:
            part = place * SPLITS + split
            tl.store(maxima + part + head * SPLITS, highest, mask=i < GROUP)
            tl.store(totals + part + head * SPLITS, total, mask=i < GROUP)
            at = head[:, None] * (SPLITS * HEAD_DIM) + d[None, :]
            tl.store(sums + part * HEAD_DIM + at, acc, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    out,
    sums,
    maxima,
    totals,
    cu_seqlens_q,
    context_starts,
    context_lens,
    window,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """o = sum over splits of 2^(m - max m) sums / sum over splits of 2^(m - max m) l."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(cu_seqlens_q + sequence)
    if row < tl.load(cu_seqlens_q + sequence + 1):
        _, end, begin, size = find_splits(
            sequence, context_starts, context_lens, window, SPLITS, BLOCK_K
        )
        split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
        used = split * size < end - begin
        inside = d < HEAD_DIM
        place = wide(row) * tl.num_programs(1) + head
        part = place * SPLITS
        highest = tl.load(maxima + part + split, mask=used, other=LOWEST)
        total = tl.load(totals + part + split, mask=used, other=0.0)
        acc = tl.load(
            sums + part * HEAD_DIM + split[:, None] * HEAD_DIM + d[None, :],
            mask=used[:, None] & inside[None, :],
            other=0.0,
        )
        weight = tl.exp2(highest - tl.max(highest, axis=0))
        total = tl.sum(weight * total, axis=0)
        result = divided(tl.sum(weight[:, None] * acc, axis=0), total)
        at = out + place * HEAD_DIM + d
        tl.store(at, rounded(result, out.dtype.element_ty), mask=inside)
