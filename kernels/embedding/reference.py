"""The formulas of ``op`` in plain torch: the oracle of every faster version, in float32."""

from torch import Tensor

from ..cells import CellRows, iter_cells
from ..tables import PrimitiveTable, Segments
from .op import AffineCell, RowsCell


def replace_rows(
    x: Tensor, ids: Tensor, table: PrimitiveTable, row: int, segments: Segments
) -> None:
    """x[i] = R[k] where ids[k] is the token of row i, if any is.

    Raises:
        IndexError: R holds every token, and a row's is not among them.
    """
    for found in iter_cells(table, row, segments):
        cell = RowsCell(*found.fields)
        tokens, out = ids[found.rows], x[found.rows]
        stored = found.numbers(cell.rows, cell.num_rows, x.shape[1]).to(x.dtype)
        if cell.ids < 0:
            out.copy_(_look_up(stored, tokens))
        else:
            replaced = found.indices(cell.ids, cell.num_rows)
            k, i = (replaced[:, None] == tokens).nonzero(as_tuple=True)
            out[i] = stored[k]


def correct_embedding(
    x: Tensor, ids: Tensor, table: PrimitiveTable, row: int, segments: Segments
) -> None:
    """x[i] = g * x[i] + w A[token of i] B, in float32.

    Raises:
        IndexError: A row's token lies outside A.
    """
    for found in iter_cells(table, row, segments):
        cell, out = AffineCell(*found.fields), x[found.rows]
        result = out.float()
        if cell.scale >= 0:
            result = result * found.numbers(cell.scale, x.shape[1])
        if cell.rank:
            result = result + found.weight * _delta(ids[found.rows], found, cell, x.shape[1])
        out.copy_(result)


def _delta(tokens: Tensor, found: CellRows, cell: AffineCell, hidden: int) -> Tensor:
    a = found.numbers(cell.a, cell.num_tokens, cell.rank)
    return _look_up(a, tokens) @ found.numbers(cell.b, cell.rank, hidden)


def _look_up(rows: Tensor, tokens: Tensor) -> Tensor:
    if ((tokens < 0) | (tokens >= len(rows))).any():
        raise IndexError("a token lies outside the embedding")
    return rows[tokens]
