"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, dot, dot_wide, find_cell, rounded, tensor_at, wide


@triton.jit(do_not_specialize=COUNTS)
def side_attention_kernel(
    out,
    query,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    seg_weight,
    row,
    num_slots,
    scale,
    heads,
    group,
    head_dim,
    query_stride,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out += w softmax(scale q Kᵀ) V for one segment's rows and one KV head with its group."""
    segment, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, row, num_slots, tl.load(seg_slot + segment), FIELDS)
    length = tl.load(cell).to(tl.int32)
    if (start < end) & (length > 0):
        of_head = wide(kv_head) * length * head_dim
        keys, values = tensor_at(numbers, cell, 1) + of_head, tensor_at(numbers, cell, 2) + of_head
        weight = tl.load(seg_weight + segment)
        k = tl.arange(0, BLOCK)
        inside = (k < head_dim)[None, :]
        step = tl.num_programs(2) * BLOCK_ROWS
        # Tile rows are the group's heads of one row, then of the next.
        for first in range(start * group + part * BLOCK_ROWS, end * group, step):
            i = tl.arange(0, BLOCK_ROWS)
            mask = (i < end * group - first)[:, None] & inside
            base = first // group
            away, head = (first + i) // group - base, kv_head * group + (first + i) % group
            of_row = wide(base) * query_stride
            q = tl.load(
                query + of_row + (away * query_stride + head * head_dim)[:, None] + k[None, :],
                mask=mask,
                other=0.0,
            )
            top = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
            acc = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
            for key_start in range(0, length, BLOCK_KEYS):
                p = key_start + tl.arange(0, BLOCK_KEYS)
                right = tl.load(
                    keys + p[None, :] * head_dim + k[:, None],
                    mask=(p < length)[None, :] & (k < head_dim)[:, None],
                    other=0.0,
                )
                scores = dot(q, right, tl.zeros((BLOCK_ROWS, BLOCK_KEYS), dtype=tl.float32))
                scores = tl.where((p < length)[None, :], scores * scale, float("-inf"))
                highest = tl.maximum(top, tl.max(scores, axis=1))
                shrunk, e = tl.exp(top - highest), tl.exp(scores - highest[:, None])
                total = total * shrunk + tl.sum(e, axis=1)
                right = tl.load(
                    values + p[:, None] * head_dim + k[None, :],
                    mask=(p < length)[:, None] & inside,
                    other=0.0,
                )
                acc = dot_wide(e, right, acc * shrunk[:, None], BOUNDED=True)
                top = highest
            at = out + wide(base) * heads * head_dim
            at += ((away * heads + head) * head_dim)[:, None] + k[None, :]
            before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            result = before + acc * (weight / total)[:, None]
            tl.store(at, rounded(result, out.dtype.element_ty), mask=mask)
