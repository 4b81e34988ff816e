"""The device code of ``gpu``: one pass over a tile of whole rows."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, rounded, wide


@triton.jit
def rms_scale(x, size, eps):
    """1 / sqrt(mean(x²) + eps) of each row of x, zeros beyond ``size``."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / size + eps)[:, None]


@triton.jit
def rms_normalized(x, weight, size, eps, dtype: tl.constexpr):
    """weight * x / sqrt(mean(x²) + eps), rounded to ``dtype`` after the division and at the end."""
    scaled = rounded(x * rms_scale(x, size, eps), dtype).to(tl.float32)
    return rounded(scaled * weight, dtype)


@triton.jit(do_not_specialize=COUNTS)
def rms_norm_kernel(
    y,
    x,
    weight,
    eps,
    num_rows,
    heads,
    size,
    row_stride,
    head_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = weight * x / sqrt(mean(x²) + eps) for BLOCK_ROWS of the heads of all rows."""
    first = tl.program_id(0) * BLOCK_ROWS
    i, k = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (i < num_rows * heads - first) & (k < size)
    row = first // heads
    away = ((first + i) // heads - row) * row_stride + (first + i) % heads * head_stride
    w = tl.load(weight + k, mask=k < size, other=0.0).to(tl.float32)
    values = tl.load(x + wide(row) * row_stride + away + k, mask=mask, other=0.0).to(tl.float32)
    result = rms_normalized(values, w, size, eps, y.dtype.element_ty)
    tl.store(y + wide(first) * size + i * size + k, result, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def add_rms_norm_kernel(
    y,
    x,
    residual,
    weight,
    eps,
    num_rows,
    size,
    x_stride,
    residual_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """residual += x, rounded; y = weight * residual / sqrt(mean(residual²) + eps)."""
    first = tl.program_id(0) * BLOCK_ROWS
    i, k = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (i < num_rows - first) & (k < size)
    w = tl.load(weight + k, mask=k < size, other=0.0).to(tl.float32)
    sums = residual + wide(first) * residual_stride + i * residual_stride + k
    added = tl.load(x + wide(first) * x_stride + i * x_stride + k, mask=mask, other=0.0)
    before = tl.load(sums, mask=mask, other=0.0)
    total = rounded(before.to(tl.float32) + added.to(tl.float32), residual.dtype.element_ty)
    tl.store(sums, total, mask=mask)
    result = rms_normalized(total.to(tl.float32), w, size, eps, y.dtype.element_ty)
    tl.store(y + wide(first) * size + i * size + k, result, mask=mask)
