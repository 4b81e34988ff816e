"""Rotary position embedding, in place, on both halves of every head.

For the halves u = head[: d/2] and v = head[d/2 :] of a row,

    u' = u cos - v sin,    v' = v cos + u sin        (arXiv:2104.09864, the GPT-NeoX pairing)

in float32, rounded once.
"""

from collections.abc import Callable

from torch import Tensor

Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""rotary(query, key, cos, sin): query (rows, heads, head_dim) and key (rows, kv_heads, head_dim),
both possibly strided over rows, are rotated in place; cos and sin (rows, head_dim / 2) float32 are
the table rows of each row's position."""
