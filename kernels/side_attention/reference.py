"""The formula of ``op`` in plain torch: the oracle of every faster version, in float32."""

import torch
from torch import Tensor

from ..cells import iter_cells
from ..tables import PrimitiveTable, Segments
from .op import Cell


def add_side_attention(
    out: Tensor,
    query: Tensor,
    table: PrimitiveTable,
    row: int,
    segments: Segments,
    kv_heads: int,
    scale: float,
) -> None:
    """out[i, head] += w softmax_p(scale q[i, head] . K[kv_head, p]) V[kv_head, p]."""
    _, heads, head_dim = query.shape
    group = heads // kv_heads
    for found in iter_cells(table, row, segments):
        cell = Cell(*found.fields)
        keys, values = (
            found.numbers(offset, kv_heads, cell.length, head_dim).repeat_interleave(group, dim=0)
            for offset in (cell.keys, cell.values)
        )
        scores = torch.einsum("ihd,hpd->ihp", query[found.rows].float(), keys) * scale
        attended = torch.einsum("ihp,hpd->ihd", scores.softmax(-1), values)
        y = out[found.rows]
        y.copy_(y.float() + found.weight * attended)
