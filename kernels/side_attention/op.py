"""Attention to an adapter's own keys in a softmax of its own (LLaMA-Adapter, arXiv:2303.16199).

    out[i, head] += w softmax_p(scale q[i, head] . K(s)[kv_head, p]) V(s)[kv_head, p],

kv_head = head // (heads // kv_heads), in float32 and rounded once; the gate is folded into V.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..tables import PrimitiveTable, Segments


class Cell(NamedTuple):
    """One adapter in one layer.

    Attributes:
        length: Keys.
        keys: Offset of K (kv_heads, length, head_dim).
        values: Offset of V (kv_heads, length, head_dim).
    """

    length: int
    keys: int
    values: int


AddSideAttention = Callable[[Tensor, Tensor, PrimitiveTable, int, Segments, int, float], None]
"""add_side_attention(out, query, table, row, segments, kv_heads, scale): out and query are (rows,
heads, head_dim); out is dense and changed in place, query dense in its last two dimensions; ``row``
is the layer."""
