"""The device code of ``gpu``: down and up, and the activations between them."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, dot, dot_wide, find_cell, load_optional, rounded, tensor_at, wide
from ..silu_mul.gpu_kernels import sigmoid
from .op import Activation, Source

OUTPUT = tl.constexpr(int(Source.OUTPUT))
RESIDUAL = tl.constexpr(int(Source.RESIDUAL))

RELU = tl.constexpr(int(Activation.RELU))
SILU = tl.constexpr(int(Activation.SILU))
GELU = tl.constexpr(int(Activation.GELU))
GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))
TANH = tl.constexpr(int(Activation.TANH))
SIGMOID = tl.constexpr(int(Activation.SIGMOID))
LEAKY_RELU = tl.constexpr(int(Activation.LEAKY_RELU))
GELU_QUICK = tl.constexpr(int(Activation.GELU_QUICK))
RELU6 = tl.constexpr(int(Activation.RELU6))
RELU_SQUARED = tl.constexpr(int(Activation.RELU_SQUARED))


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def tanh(x):
    """tanh x, by Cephes' polynomial below 0.625, where 1 - exp(-2 |x|) would lose digits."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, p * square * x + x, tl.where(x < 0, -size, size))


@triton.jit
def gelu(x):
    """x Phi(x), by the fit to Phi's tail of ``activations.h``: 1 + erf would lose its digits."""
    u = tl.abs(x) * 0.707106781
    t = 1.0 / (1.0 + 0.37 * u)
    p = 0.0620600693 * t - 0.303940648
    p = p * t + 0.488227216
    p = p * t - 0.286907111
    p = p * t + 0.311914563
    p = p * t + 0.10604004
    p = p * t + 0.206379142
    p = p * t + 0.207411884
    p = p * t + 0.20881483
    tail = 0.5 * t * p * tl.exp(-u * u)
    return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def activated(x, number):
    """f(x) by the number of an ``Activation``; the linear one leaves x as it is."""
    if number == RELU:
        x = relu(x)
    elif number == SILU:
        x = x * sigmoid(x)
    elif number == GELU:
        x = gelu(x)
    elif number == GELU_TANH:
        # x (1 + tanh k) / 2 = x sigmoid(2 k), k = sqrt(2 / pi) (x + 0.044715 x³)
        x = x * sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))
    elif number == TANH:
        x = tanh(x)
    elif number == SIGMOID:
        x = sigmoid(x)
    elif number == LEAKY_RELU:
        x = tl.where(x < 0, 0.01 * x, x)
    elif number == GELU_QUICK:
        x = x * sigmoid(1.702 * x)
    elif number == RELU6:
        x = relu(tl.where(x > 6.0, 6.0, x))
    elif number == RELU_SQUARED:
        x = relu(x) * relu(x)
    return x


@triton.jit(do_not_specialize=COUNTS)
def down_kernel(
    inner,
    h,
    r,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    row,
    num_slots,
    hidden,
    num_rows,
    max_inner,
    FIELDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """inner[split, i, :] = D[:, k in split] z[i, k in split] for a program's rows in a segment."""
    segment, part, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    split, width_start = place % SPLITS, (place // SPLITS) * BLOCK_WIDTH
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, row, num_slots, tl.load(seg_slot + segment), FIELDS)
    width = tl.load(cell).to(tl.int32)
    if (start < end) & (width_start < width):
        source = tl.load(cell + 2)
        # Nothing is read of what is not in the sum.
        h_end = tl.where(source == RESIDUAL, 0, hidden)
        r_end = tl.where(source == OUTPUT, 0, hidden)
        w = width_start + tl.arange(0, BLOCK_WIDTH)
        down = tensor_at(numbers, cell, 3)
        plane = inner + wide(split) * num_rows * max_inner
        for first in range(start + part * BLOCK_ROWS, end, tl.num_programs(1) * BLOCK_ROWS):
            i = tl.arange(0, BLOCK_ROWS)
            there = i < end - first
            h_rows, r_rows = h + wide(first) * hidden, r + wide(first) * hidden
            acc = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
            for block in range(split * BLOCK_IN, hidden, SPLITS * BLOCK_IN):
                k = block + tl.arange(0, BLOCK_IN)
                at = i[:, None] * hidden + k[None, :]
                of_h = tl.load(h_rows + at, mask=there[:, None] & (k < h_end)[None, :], other=0.0)
                of_r = tl.load(r_rows + at, mask=there[:, None] & (k < r_end)[None, :], other=0.0)
                z = rounded(of_h.to(tl.float32) + of_r.to(tl.float32), h.dtype.element_ty)
                right = tl.load(
                    down + w[None, :] * hidden + k[:, None],
                    mask=(w < width)[None, :] & (k < hidden)[:, None],
                    other=0.0,
                )
                if BLOCK_ROWS == 1:
                    product = tl.trans(z).to(tl.float32) * right.to(tl.float32)
                    acc += tl.sum(product, axis=0)[None, :]
                else:
                    acc = dot(z, right, acc)
            at = plane + wide(first) * max_inner + i[:, None] * max_inner + w[None, :]
            tl.store(at, acc, mask=there[:, None] & (w < width)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def up_kernel(
    out,
    inner,
    cells,
    numbers,
    seg_start,
    seg_end,
    seg_slot,
    seg_weight,
    row,
    num_slots,
    hidden,
    num_rows,
    max_inner,
    FIELDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """out += w (f(sum of inner's splits + d) U + u) over a program's rows and block of columns."""
    segment, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(seg_start + segment), tl.load(seg_end + segment)
    cell = find_cell(cells, row, num_slots, tl.load(seg_slot + segment), FIELDS)
    width = tl.load(cell).to(tl.int32)
    if (start < end) & (width >= 0):
        activation = tl.load(cell + 1)
        up = tensor_at(numbers, cell, 4)
        column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inside = column < hidden
        u = load_optional(numbers, cell, 6, column, hidden, 0.0)
        weight = tl.load(seg_weight + segment)
        plane_size = wide(num_rows) * max_inner
        for first in range(start + part * BLOCK_ROWS, end, tl.num_programs(1) * BLOCK_ROWS):
            i = tl.arange(0, BLOCK_ROWS)
            there = i < end - first
            acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
            for width_start in range(0, width, BLOCK_WIDTH):
                w = width_start + tl.arange(0, BLOCK_WIDTH)
                at = inner + wide(first) * max_inner + i[:, None] * max_inner + w[None, :]
                mask = there[:, None] & (w < width)[None, :]
                left = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                for split in range(SPLITS):
                    left += tl.load(at + split * plane_size, mask=mask, other=0.0)
                left += load_optional(numbers, cell, 5, w, width, 0.0)[None, :]
                # Beyond the width f(0) need not be 0, but what it is multiplied by is.
                left = activated(left, activation)
                right = tl.load(
                    up + w[:, None] * hidden + column[None, :],
                    mask=(w < width)[:, None] & inside[None, :],
                    other=0.0,
                )
                if BLOCK_ROWS == 1:
                    product = tl.trans(left) * right.to(tl.float32)
                    acc += tl.sum(product, axis=0)[None, :]
                else:
                    acc = dot_wide(left, right, acc)
            at = out + wide(first) * hidden + i[:, None] * hidden + column[None, :]
            mask = there[:, None] & inside[None, :]
            base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            result = base + weight * (acc + u[None, :])
            tl.store(at, rounded(result, out.dtype.element_ty), mask=mask)
