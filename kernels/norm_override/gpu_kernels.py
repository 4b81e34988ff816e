"""The device code of ``gpu``: whole rows of one segment, tile after tile."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, find_cell, load_optional, rounded, tensor_at, wide
from ..rms_norm.gpu_kernels import rms_normalized


@triton.jit(do_not_specialize=COUNTS)
def override_norm_kernel(
    y,
    x,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    row,
    num_slots,
    eps,
    heads,
    size,
    row_stride,
    head_stride,
    CENTERED: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = g * normalized(x) + b for every BLOCK_ROWS-th heads of one segment."""
    segment, part = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, row, num_slots, tl.load(seg_slot + segment), FIELDS)
    if (start < end) & (tl.load(cell) >= 0):
        i, column = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK)
        k = column[None, :]
        g = tl.load(tensor_at(numbers, cell, 0) + k, mask=k < size, other=0.0).to(tl.float32)
        biased = tl.load(cell + 1) >= 0
        b = load_optional(numbers, cell, 1, column, size, 0.0)[None, :]
        dtype: tl.constexpr = y.dtype.element_ty
        step = tl.num_programs(1) * BLOCK_ROWS
        for first in range(start * heads + part * BLOCK_ROWS, end * heads, step):
            mask = (i < end * heads - first) & (k < size)
            base = first // heads
            away = ((first + i) // heads - base) * row_stride + (first + i) % heads * head_stride
            at = x + wide(base) * row_stride + away + k
            values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if CENTERED:
                mean = tl.sum(values, axis=1)[:, None] / size
                apart = tl.where(mask, values - mean, 0.0)
                scale = tl.rsqrt(tl.sum(apart * apart, axis=1) / size + eps)[:, None]
                result = rounded(apart * scale * g + b, dtype)
            else:
                result = rms_normalized(values, g, size, eps, dtype)
                # Without a bias nothing is added, so that a zero keeps its sign.
                if biased:
                    result = rounded(result.to(tl.float32) + b, dtype)
            tl.store(y + wide(first) * size + i * size + k, result, mask=mask)
