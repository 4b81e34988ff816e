"""Sparse weight differences: ``y[i:j, columns(t)] += w x[i:j] S(t, s)ᵀ``; a ``CorrectLinear``.

S (out, in) is stored by rows (CSR): row o has the entries ``row_starts[o] .. row_starts[o + 1]``.
On a GPU rows of float32 may meet a pool of 16 bits, for ``spectral``.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One adapter on one target.

    Attributes:
        num_entries: Entries of S.
        row_starts: Offset (int32) of (out + 1,), ascending from 0 to ``num_entries``.
        columns: Offset (int32) of (num_entries,), each below ``in``.
        values: Offset of (num_entries,).
    """

    num_entries: int
    row_starts: int
    columns: int
    values: int
