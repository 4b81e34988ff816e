"""The formula of ``op`` in plain torch, in float32."""

import torch
from torch import Tensor

from ..cells import CellRows, add_weighted
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def add_sparse(
    y: Tensor, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> None:
    """y[i:j, columns(t)] += w x[i:j] S(t, s)ᵀ; y and x may be float32 whatever the pool's dtype."""
    add_weighted(y, x, table, targets, segments, times_entries)


def times_entries(x: Tensor, found: CellRows, width: int) -> Tensor:
    """x Sᵀ (rows, width) for x (rows, in)."""
    cell = Cell(*found.fields)
    row_starts = found.indices(cell.row_starts, width + 1)
    columns = found.indices(cell.columns, cell.num_entries)
    rows = torch.repeat_interleave(torch.arange(width, device=x.device), row_starts.diff())
    terms = x[:, columns] * found.numbers(cell.values, cell.num_entries)
    return torch.zeros(x.shape[0], width, device=x.device).index_add_(1, rows, terms)
