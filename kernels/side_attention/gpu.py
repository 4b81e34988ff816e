"""add_side_attention on a GPU, in one launch for all segments.

A program has one KV head and some rows of a segment, with all query heads that share it: the group
fills a tile for matrix units even where there is one row, and K and V are read once for all of
them. Queries and out pass through memory once. The softmax runs over blocks of 16 keys, which is
most adapters' whole length.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..gpu.launch import Launch, power_of_two
from ..gpu.registry import register
from ..gpu.rows import PLACE, PROMPT, ROWS, Place, check_place, flat, production_places, require
from ..gpu.shapes import Shapes, shape_only
from ..tables import PrimitiveTable, Segments
from .gpu_kernels import side_attention_kernel
from .op import Cell

BLOCK_KEYS = 16
"""The least that matrix units take."""


def side_launch(out: Tensor, query: Tensor, kv_heads: int, scale: float, place: Place) -> Launch:
    """out[i, head] += w softmax_p(scale q[i, head] . K[kv_head, p]) V[kv_head, p]."""
    _, heads, head_dim = query.shape
    group = heads // kv_heads
    rows = 16 if place.max_rows * group <= 16 else 64
    return Launch(
        side_attention_kernel,
        (place.num_segments, kv_heads, place.parts(max(rows // group, 1), kv_heads)),
        {
            "out": out,
            "query": query,
            **place.segments,
            "seg_weight": place.weight,
            "scale": scale,
            "heads": heads,
            "group": group,
            "head_dim": head_dim,
            "query_stride": query.stride(0),
        },
        {
            "FIELDS": len(Cell._fields),
            "BLOCK_ROWS": rows,
            "BLOCK_KEYS": BLOCK_KEYS,
            "BLOCK": max(power_of_two(head_dim), 16),
        },
        num_warps=2 if rows == 16 else 4,
        matrix=True,
    )


def add_side_attention(
    out: Tensor,
    query: Tensor,
    table: PrimitiveTable,
    row: int,
    segments: Segments,
    kv_heads: int,
    scale: float,
) -> None:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    check_place("add_side_attention", out, table, [query])
    _, heads, head_dim = query.shape
    require(
        heads == 1 or query.stride(1) == head_dim,
        "add_side_attention: the query's heads must be dense",
        query,
    )
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"add_side_attention: the query's heads do not fit {kv_heads} heads of keys",
        query,
    )
    _ADD(out, query, kv_heads, scale, *flat(table, row, segments))


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Of a decode step and of a prompt."""
    for rows, place in zip((ROWS, PROMPT), production_places(dtype), strict=True):
        x = shape_only(rows, shapes.heads, shapes.head_dim, dtype=dtype)
        yield side_launch(x, x, shapes.kv_heads, shapes.head_dim**-0.5, place)


def _run(out: Tensor, query: Tensor, kv_heads: int, scale: float, *place: Any) -> None:
    side_launch(out, query, kv_heads, scale, Place(*place)).run()


_ADD = register(
    f"add_side_attention(Tensor(a!) out, Tensor query, int kv_heads, float scale, {PLACE}) -> ()",
    _run,
)
