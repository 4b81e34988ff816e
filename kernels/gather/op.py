"""Rows of a table that never changes: token embeddings, cosines of positions.

y[i] = table[indices[i]]
"""

from collections.abc import Callable

from torch import Tensor

GatherRows = Callable[[Tensor, Tensor], Tensor]
"""gather_rows(table, indices): table (entries, size), contiguous; indices (rows,) int64 -> a new
contiguous (rows, size). An index outside the table is an IndexError where the device can tell."""
