"""The device code of ``gpu``."""

import triton
import triton.language as tl

from ..gpu.device import COUNTS, rounded, wide


@triton.jit
def rotate(
    heads, first, num_heads, stride, cos, sin, half, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """u, v = u cos - v sin, v cos + u sin over the halves of BLOCK_HEADS heads of one row."""
    head, k = first + tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = k < half
    mask = (head < num_heads) & inside
    c = tl.load(cos + k, mask=inside, other=0.0)
    s = tl.load(sin + k, mask=inside, other=0.0)
    at = heads + head * stride + k
    u = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = heads.dtype.element_ty
    tl.store(at, rounded(u * c - v * s, dtype), mask=mask)
    tl.store(at + half, rounded(v * c + u * s, dtype), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def rotary_kernel(
    query,
    key,
    cos,
    sin,
    heads,
    kv_heads,
    half,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    cos_stride,
    sin_stride,
    query_blocks,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rotation of one row's block of query heads, or of key heads behind those."""
    row, block = tl.program_id(0), tl.program_id(1)
    c, s = cos + wide(row) * cos_stride, sin + wide(row) * sin_stride
    if block < query_blocks:
        rotate(
            query + wide(row) * query_stride,
            block * BLOCK_HEADS,
            heads,
            query_head_stride,
            c,
            s,
            half,
            BLOCK_HEADS,
            BLOCK,
        )
    else:
        rotate(
            key + wide(row) * key_stride,
            (block - query_blocks) * BLOCK_HEADS,
            kv_heads,
            key_head_stride,
            c,
            s,
            half,
            BLOCK_HEADS,
            BLOCK,
        )
