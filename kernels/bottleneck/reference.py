"""The formula of ``op`` in plain torch: the oracle of every faster version, in float32."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ..cells import CellRows, iter_cells
from ..tables import PrimitiveTable, Segments
from .op import Activation, Cell, Source


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.LINEAR: _identity,
    Activation.RELU: functional.relu,
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.LEAKY_RELU: functional.leaky_relu,
    Activation.GELU_QUICK: _gelu_quick,
    Activation.RELU6: functional.relu6,
    Activation.RELU_SQUARED: _relu_squared,
}
"""f by its number in a cell."""


def add_bottleneck(
    out: Tensor, h: Tensor, r: Tensor, table: PrimitiveTable, row: int, segments: Segments
) -> None:
    """out[i:j] += w (f(z Dᵀ + d) U + u) for z = h, r or h + r."""
    for found in iter_cells(table, row, segments):
        cell = Cell(*found.fields)
        z = _source(h[found.rows], r[found.rows], Source(cell.source)).float()
        y = out[found.rows]
        y.copy_(y.float() + found.weight * _correction(z, found, cell))


def _source(h: Tensor, r: Tensor, source: Source) -> Tensor:
    match source:
        case Source.OUTPUT:
            return h
        case Source.RESIDUAL:
            return r
        case Source.SUM:
            return h + r


def _correction(z: Tensor, found: CellRows, cell: Cell) -> Tensor:
    hidden = z.shape[1]
    inner = z @ found.numbers(cell.down, cell.width, hidden).T
    if cell.down_bias >= 0:
        inner = inner + found.numbers(cell.down_bias, cell.width)
    inner = ACTIVATIONS[Activation(cell.activation)](inner)
    result = inner @ found.numbers(cell.up, cell.width, hidden)
    return result if cell.up_bias < 0 else result + found.numbers(cell.up_bias, hidden)
