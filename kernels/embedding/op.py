"""Corrections of embedded rows: replaced rows, then a scaled and low-rank one.

    replace_rows:        x[i] = R(s)[k]     where ids[k] is the token of row i, if any is
    correct_embedding:   x[i] = g(s) * x[i] + w A(s)[token of i] B(s)

the latter in float32 and rounded once. A token outside A, or outside an R of every token, is
an IndexError.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..tables import PrimitiveTable, Segments


class RowsCell(NamedTuple):
    """Replaced rows of one adapter.

    Attributes:
        num_rows: Rows stored.
        rows: Offset of R (num_rows, hidden).
        ids: Offset (int32) of (num_rows,), ascending; -1 where R holds every token, in order.
    """

    num_rows: int
    rows: int
    ids: int = -1


class AffineCell(NamedTuple):
    """Low-rank correction of one adapter.

    Attributes:
        rank: Columns of A; 0 without A and B.
        num_tokens: Rows of A; -1 without A and B.
        a: Offset of A (num_tokens, rank).
        b: Offset of B (rank, hidden).
        scale: Offset of g (hidden,), -1 without one; not multiplied by the weight w.
    """

    rank: int
    num_tokens: int = -1
    a: int = -1
    b: int = -1
    scale: int = -1


CorrectEmbedding = Callable[[Tensor, Tensor, PrimitiveTable, int, Segments], None]
"""correct(x, ids, table, row, segments): x (rows, hidden), dense, is changed in place; ids (rows,)
int64; ``row`` is the table's row of the embedding."""
