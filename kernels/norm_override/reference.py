"""The formula of ``op`` in plain torch: the oracle of every faster version."""

from torch import Tensor
from torch.nn.functional import layer_norm

from ..cells import iter_cells
from ..rms_norm.reference import rms_norm
from ..tables import PrimitiveTable, Segments
from .op import Cell


def override_norm(
    y: Tensor,
    x: Tensor,
    table: PrimitiveTable,
    row: int,
    segments: Segments,
    eps: float,
    centered: bool,
) -> None:
    """y[i:j] = g * normalized(x[i:j]) + b, rounded as ``op`` says."""
    size = x.shape[-1]
    for found in iter_cells(table, row, segments):
        cell = Cell(*found.fields)
        rows = x[found.rows]
        weight = found.numbers(cell.weight, size).to(x.dtype)
        bias = found.numbers(cell.bias, size).to(x.dtype) if cell.bias >= 0 else None
        if centered:
            y[found.rows] = layer_norm(rows, (size,), weight, bias, eps)
        else:
            normed = rms_norm(rows, weight, eps)
            y[found.rows] = normed if bias is None else normed + bias
