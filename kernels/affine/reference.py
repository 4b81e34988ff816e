"""The formula of ``op`` in plain torch: the oracle of every faster version, in float32."""

import torch
from torch import Tensor

from ..cells import CellRows, iter_outputs
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def correct_affine(
    y: Tensor, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> None:
    """y[i:j, columns(t)] = g * y[i:j, columns(t)] + w ((x[i:j] Aᵀ) B + c), in float32."""
    for found, out in iter_outputs(y, table, targets, segments):
        cell, width = Cell(*found.fields), out.shape[1]
        base = out.float()
        if cell.scale >= 0:
            base = base * found.numbers(cell.scale, width)
        out.copy_(base + found.weight * _delta(x[found.rows].float(), found, cell, width))


def _delta(x: Tensor, found: CellRows, cell: Cell, width: int) -> Tensor:
    delta = torch.zeros(x.shape[0], width, device=x.device)
    if cell.rank:
        a = found.numbers(cell.a, cell.rank, x.shape[1])
        delta = (x @ a.T) @ found.numbers(cell.b, cell.rank, width)
    if cell.bias >= 0:
        delta = delta + found.numbers(cell.bias, width)
    return delta
