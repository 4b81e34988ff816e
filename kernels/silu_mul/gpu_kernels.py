"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, rounded, wide


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), by exp(-|x|) so that nothing overflows; NaN stays NaN."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit(do_not_specialize=COUNTS)
def silu_mul_kernel(y, gate_up, size, row_stride, BLOCK: tl.constexpr):
    """y = silu(gate) * up for one row and block of columns."""
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    at = gate_up + wide(row) * row_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
    result = rounded(gate * sigmoid(gate) * up, y.dtype.element_ty)
    tl.store(y + wide(row) * size + column, result, mask=inside)
