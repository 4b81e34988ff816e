"""Kronecker-factored differences, never expanded; a ``tables.CorrectLinear``.

With X = x.view(m, n), Y = y.view(l, k) over the target's columns, L (l, m) and R (k, n),

    Y += w L X Rᵀ      which is      y += w kron(L, R) x,

where R is stored whole (rank 0) or as R = U D with D (rank, n) and U (k, rank).
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One adapter on one target; in = m n, out = l k.

    Attributes:
        left_rows: l.
        left_columns: m.
        rank: Of R where it is factored, else 0.
        left: Offset of L (l, m).
        right: Offset of R (k, n) where rank is 0, else of D (rank, n).
        up: Offset of U (k, rank), -1 where rank is 0.
    """

    left_rows: int
    left_columns: int
    rank: int
    left: int
    right: int
    up: int = -1
