"""The formulas of ``op`` in plain torch, transforms in float32 from beginning to end."""

import torch
from torch import Tensor

from ..cells import CellRows, iter_cells
from ..tables import PrimitiveTable, Segments, SiteTargets
from .op import Cell


def transform_input(x: Tensor, table: PrimitiveTable, row: int, segments: Segments) -> None:
    """x[i:j] <- s * x[i:j], then every stage's rotations of permuted blocks; rounded once."""
    for found in iter_cells(table, row, segments):
        rows = x[found.rows]
        rows.copy_(_transformed(rows.float(), found, Cell(*found.fields)))


def spread_rows(x: Tensor, chosen: Tensor, copies: int) -> Tensor:
    """X and, below it, x[chosen] as many times."""
    return torch.cat([x, *[x[chosen]] * copies])


def collect_outputs(y: Tensor, chosen: Tensor, targets: SiteTargets) -> Tensor:
    """The first rows of y, with every target's columns from the rows that were appended for it."""
    count, further = len(chosen), len(targets.out_starts) - 1
    own, *appended = torch.split(y, [len(y) - further * count, *[count] * further])
    columns = zip(targets.out_starts[1:], targets.out_sizes[1:], strict=True)
    for (first, width), part in zip(columns, appended, strict=True):
        own[chosen, first : first + width] = part[:, first : first + width]
    return own


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
