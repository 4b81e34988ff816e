"""The formula of ``op`` in plain torch, in float32."""

from torch import Tensor

from ..cells import CellRows, add_weighted
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def add_kronecker(
    y: Tensor, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> None:
    """y[i:j, columns(t)] += w kron(L(t, s), R(t, s)) x[i:j], as Y += w L X Rᵀ row by row."""
    add_weighted(y, x, table, targets, segments, _delta)


def _delta(x: Tensor, found: CellRows, width: int) -> Tensor:
    cell = Cell(*found.fields)
    n, k = x.shape[1] // cell.left_columns, width // cell.left_rows
    left = found.numbers(cell.left, cell.left_rows, cell.left_columns)
    product = x.view(x.shape[0], cell.left_columns, n)
    if cell.rank:
        product = product @ found.numbers(cell.right, cell.rank, n).T
        product = product @ found.numbers(cell.up, k, cell.rank).T
    else:
        product = product @ found.numbers(cell.right, k, n).T
    return (left @ product).flatten(1)
