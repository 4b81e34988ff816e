"""The formula of ``op`` in plain torch, in float32."""

from torch import Tensor

from ..cells import iter_outputs
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def replace_outputs(
    y: Tensor, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> None:
    """y[i:j, column(t) + index_k] = x[i:j] . W_k."""
    for found, out in iter_outputs(y, table, targets, segments):
        cell = Cell(*found.fields)
        weight = found.numbers(cell.weight, cell.num_rows, x.shape[1])
        values = x[found.rows].float() @ weight.T
        out[:, found.indices(cell.indices, cell.num_rows)] = values.to(out.dtype)
