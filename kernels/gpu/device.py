"""What several GPU kernels compute with: products of tiles, and where an adapter's tensors lie."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels are interpreted: TRITON_INTERPRET was set when triton was imported."""

COUNTS = ("first", "row", "num_rows", "num_slots", "num_sequences", "parts")
"""Parameters that differ from step to step: kernels are not compiled anew for kinds of them."""

ALIGNED = tl.constexpr(16)
"""Elements of four bytes in 64."""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """The numbers of ``dtype`` nearest to x of float32, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # there the interpreter cuts bits off
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32."""
    # The interpreter keeps bfloat16 as integers and would multiply those; products of 16-bit
    # numbers are exact in float32.
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_wide(a, b, acc, BOUNDED: tl.constexpr = False):
    """acc + a @ b in float32, with a float32 and b perhaps of 16 bits."""
    # Matrix units take a as the sum of two 16-bit numbers: its rounding then stays below float32's.
    if b.dtype == tl.float32:
        return dot(a, b, acc)
    high = rounded(a, b.dtype)
    rest = a - high.to(tl.float32)
    # Beyond float16's range, which a BOUNDED a is in, the high part is infinite, and stays so.
    if b.dtype == tl.float16 and not BOUNDED:
        rest = tl.where(tl.abs(rest) <= tl.abs(a), rest, 0.0)
    return dot(rounded(rest, b.dtype), b, dot(high, b, acc))


@triton.jit
def wide(number):
    """An integer as int64, for offsets that may pass 2³¹."""
    return number + tl.full((), 0, tl.int64)


@triton.jit
def find_cell(cells, row, num_slots, slot, FIELDS: tl.constexpr):
    """Where the fields of the adapter in ``slot`` begin, at the place of table row ``row``."""
    return cells + (wide(row) * num_slots + slot) * FIELDS


@triton.jit
def tensor_at(pool, cell, field):
    """Where the tensor lies whose offset is this field of a cell."""
    # Tensors begin at multiples of 64 bytes, which lets their rows be read 16 bytes at a time.
    return pool + tl.multiple_of(tl.load(cell + field), ALIGNED)


@triton.jit
def optional_at(pool, offset, index, size, otherwise):
    """Elements below ``size`` of a tensor, as float32; ``otherwise`` where its offset is -1."""
    # No mask is the product of a scalar and a block: the interpreter makes such ones integers.
    there = tl.where(offset >= 0, size, 0)
    found = tl.load(pool + tl.multiple_of(offset, ALIGNED) + index, mask=index < there, other=0.0)
    return tl.where(index < there, found.to(tl.float32), otherwise)


@triton.jit
def load_optional(pool, cell, field, index, size, otherwise):
    """Elements of the tensor whose offset is this field of a cell, as ``optional_at``."""
    return optional_at(pool, tl.load(cell + field), index, size, otherwise)


@triton.jit
def choose(index, first, second, third, fourth):
    """One of four scalars: what a launch knows of each of a site's targets."""
    return tl.where(
        index == 0, first, tl.where(index == 1, second, tl.where(index == 2, third, fourth))
    )
