"""rotary on a GPU: queries and keys in one launch, each read and written once.

One program has a few heads of one row, all of the queries or all of the keys: cos and sin of the
row are read by each of its programs, from cache after the first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gpu.launch import Launch, ceil_div, power_of_two
from ..gpu.registry import register
from ..gpu.rows import PROMPT, ROWS, require
from ..gpu.shapes import Shapes, shape_only
from .gpu_kernels import rotary_kernel

TILE = 512
"""Pairs of numbers that a program rotates, as far as there are heads."""


def rotary_launch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Launch:
    """Rotate query and key in place."""
    num_rows, half = cos.shape
    heads, kv_heads = query.shape[1], key.shape[1]
    columns = power_of_two(half)
    block = min(max(TILE // columns, 1), power_of_two(max(heads, kv_heads)))
    query_blocks = ceil_div(heads, block)
    return Launch(
        rotary_kernel,
        (num_rows, query_blocks + ceil_div(kv_heads, block)),
        {
            "query": query,
            "key": key,
            "cos": cos,
            "sin": sin,
            "heads": heads,
            "kv_heads": kv_heads,
            "half": half,
            "query_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "key_stride": key.stride(0),
            "key_head_stride": key.stride(1),
            "cos_stride": cos.stride(0),
            "sin_stride": sin.stride(0),
            "query_blocks": query_blocks,
        },
        {"BLOCK_HEADS": block, "BLOCK": columns},
        num_warps=2,
    )


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    rows, half = cos.shape
    for table in (cos, sin):
        require(
            table.shape == (rows, half)
            and table.dtype is torch.float32
            and table.device == query.device
            and table.stride(1) == 1,
            f"rotary: cos and sin must be (rows, head_dim / 2) float32 on {query.device}",
            table,
        )
    for heads in (query, key):
        require(
            heads.shape == (rows, heads.shape[1], 2 * half) and heads.dtype is query.dtype,
            "rotary: query, key, cos and sin do not fit together",
            heads,
            cos,
        )
        require(
            heads.stride(2) == 1 and heads.device == query.device,
            f"rotary: expected heads on {query.device}, dense in their last dimension",
            heads,
        )
    _ROTARY(query, key, cos, sin)


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Of queries and keys as they lie beside the values, in the output of one GEMM."""
    for rows in (ROWS, PROMPT):
        heads = shapes.heads + 2 * shapes.kv_heads
        qkv = shape_only(rows, heads, shapes.head_dim, dtype=dtype)
        angles = shape_only(rows, shapes.head_dim // 2, dtype=torch.float32)
        query, key = qkv[:, : shapes.heads], qkv[:, shapes.heads : shapes.heads + shapes.kv_heads]
        yield rotary_launch(query, key, angles, angles)


def _run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    rotary_launch(query, key, cos, sin).run()


_ROTARY = register("rotary(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin) -> ()", _run)
