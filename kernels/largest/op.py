"""Where the largest number of each row stands: the token of a greedy row.

    indices[i] = min {j : x[i, j] = max_k x[i, k]} if that largest number is finite, else -1

A NaN counts as larger than every number. Zeros of either sign are equal.
"""

from collections.abc import Callable

from torch import Tensor

Largest = Callable[[Tensor], Tensor]
"""largest(x): x (rows, size) float32, dense in its rows, size > 0 -> new indices (rows,) int32.
IndexError where size is 0."""
