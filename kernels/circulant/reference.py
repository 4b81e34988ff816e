"""The formula of ``op`` in plain torch, in float32: the blocks expanded, then one product."""

import torch
from torch import Tensor

from ..cells import CellRows, add_weighted
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def add_circulant(
    y: Tensor, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> None:
    """y_m[p] += w sum_n sum_q K[m, n, (q - p) mod b] x_n[q]."""
    add_weighted(y, x, table, targets, segments, _delta)


def _delta(x: Tensor, found: CellRows, width: int) -> Tensor:
    cell, b = Cell(*found.fields), Cell(*found.fields).block
    kernel = found.numbers(cell.kernel, width // b, x.shape[1] // b, b)
    position = torch.arange(b, device=x.device)
    blocks = kernel[:, :, (position - position[:, None]) % b]  # (out / b, in / b, p, q)
    inputs = x.view(x.shape[0], x.shape[1] // b, b)
    return torch.einsum("mnpq,rnq->rmp", blocks, inputs).flatten(1)
