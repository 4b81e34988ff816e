"""Replaced rows of a weight: ``y[i:j, column(t) + index_k] = x[i:j] . W_k``; a ``CorrectLinear``.

For heads with a few trained tokens. The segments' weights are not used: a replacement has no half.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One adapter on one target.

    Attributes:
        num_rows: Rows that are replaced.
        indices: Offset (int32) of (num_rows,), ascending, each below ``out``.
        weight: Offset of W (num_rows, in).
    """

    num_rows: int
    indices: int
    weight: int
