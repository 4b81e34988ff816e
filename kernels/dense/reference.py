"""The formula of ``op`` in plain torch, in float32."""

from torch import Tensor

from ..cells import CellRows, add_weighted
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def add_dense(
    y: Tensor, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> None:
    """y[i:j, columns(t)] += w x[i:j] D(t, s)ᵀ."""
    add_weighted(y, x, table, targets, segments, _delta)


def _delta(x: Tensor, found: CellRows, width: int) -> Tensor:
    return x @ found.numbers(Cell(*found.fields).weight, width, x.shape[1]).T
