"""The formula of ``op`` in plain torch, in float32 from beginning to end."""

import torch
from torch import Tensor

from ..cells import CellRows, iter_cells
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def transform_inputs(
    x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> Tensor:
    """inputs[t, i:j] = s * x[i:j], then rotations of permuted blocks, by stages; rounded once."""
    inputs = x.repeat(len(targets.out_starts), 1, 1)
    for position, rows in enumerate(inputs):
        for found in iter_cells(table, targets.first + position, segments):
            own = rows[found.rows]
            own.copy_(_transformed(own.float(), found, Cell(*found.fields)))
    return inputs


def _transformed(x: Tensor, found: CellRows, cell: Cell) -> Tensor:
    size = x.shape[1]
    if cell.scale >= 0:
        x = x * found.numbers(cell.scale, size)
    if cell.stages == 0:
        return x
    shape = (cell.stages, cell.num_blocks, cell.block, cell.block)
    order = torch.arange(size, device=x.device).expand(cell.stages, size)
    if cell.permutations >= 0:
        order = found.indices(cell.permutations, cell.stages, size)
    for rotation, p in zip(found.numbers(cell.rotations, *shape), order, strict=True):
        rotated = x[:, p].view(x.shape[0], size // cell.block, 1, cell.block) @ rotation
        x = torch.empty_like(x).index_copy_(1, p, rotated.flatten(1))
    return x
