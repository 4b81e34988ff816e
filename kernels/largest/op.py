"""The largest number of each row and where it first stands: a greedy row's next token.

    values[i] = max_j x[i, j],    indices[i] = min {j : x[i, j] = values[i]}

A NaN counts as larger than every number; zeros of either sign are equal.
"""

from collections.abc import Callable

from torch import Tensor

Largest = Callable[[Tensor], tuple[Tensor, Tensor]]
"""largest(x): x (rows, size) float32, dense in its rows, size > 0 -> new values (rows,) float32 and
indices (rows,) int64. IndexError where size is 0."""
