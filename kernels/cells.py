"""What the reference operations share: the cells of a batch, and their tensors in float32."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .tables import PrimitiveTable, Segments, SiteTargets


@dataclass(frozen=True, slots=True)
class CellRows:
    """Rows of a batch whose adapter has a cell at the place in question.

    Attributes:
        rows: One segment's rows.
        weight: The segment's w.
        fields: Of the cell, for its ``op`` module's ``Cell``.
        table: Where the fields' offsets point.
    """

    rows: slice
    weight: float
    fields: tuple[int, ...]
    table: PrimitiveTable

    def numbers(self, offset: int, *shape: int) -> Tensor:
        """The tensor of numbers that begins at ``offset``, as float32.

        Raises:
            IndexError: It reaches outside the pool.
        """
        return _located(self.table.numbers, offset, shape).float()

    def indices(self, offset: int, *shape: int) -> Tensor:
        """The tensor of indices that begins at ``offset``, as int64.

        Raises:
            IndexError: It reaches outside the pool.
        """
        return _located(self.table.indices, offset, shape).long()


def iter_cells(table: PrimitiveTable, row: int, segments: Segments) -> Iterator[CellRows]:
    """The segments with rows whose adapters have a cell in this row of the table, with that."""
    columns = (segments.start, segments.end, segments.adapter_slot, segments.weight)
    for start, end, slot, weight in zip(*(c.tolist() for c in columns), strict=True):
        fields = tuple(table.cells[row, slot].tolist())
        if start < end and fields[0] >= 0:
            yield CellRows(slice(start, end), weight, fields, table)


def iter_outputs(
    y: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> Iterator[tuple[CellRows, Tensor]]:
    """Every cell of a site's targets, with the rows and columns of ``y`` that it corrects."""
    columns = zip(targets.out_starts, targets.out_sizes, strict=True)
    for position, (first, width) in enumerate(columns):
        for cell in iter_cells(table, targets.first + position, segments):
            yield cell, y[cell.rows, first : first + width]


def add_weighted(
    y: Tensor,
    x: Tensor,
    table: PrimitiveTable,
    targets: SiteTargets,
    segments: Segments,
    delta: Callable[[Tensor, CellRows, int], Tensor],
) -> None:
    """y[i:j, columns(t)] += w delta(x[i:j], cell, width of t), in float32 and rounded once."""
    for cell, out in iter_outputs(y, table, targets, segments):
        out.copy_(out.float() + cell.weight * delta(x[cell.rows].float(), cell, out.shape[1]))


def _located(pool: Tensor, offset: int, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if min(offset, *shape) < 0 or offset + count > pool.numel():
        raise IndexError(f"a tensor of {shape} at {offset} reaches outside {pool.numel()} elements")
    return pool[offset : offset + count].view(shape)
