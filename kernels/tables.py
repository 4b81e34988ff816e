"""How kernels find the weights of the adapters in a batch: tables over one flat pool.

Every primitive has one table. Its cell (row, slot) holds a few integers, the *fields* of the
primitive's ``Cell`` in its ``op`` module: sizes, and where in the pool each tensor begins. A cell
whose first field is negative is empty: the adapter in that slot leaves that place alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Place = Callable[[npt.NDArray[Any]], Tensor]
"""Brings an array to the device; it need not be there before kernels are launched."""


def _lengthened(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """The array with as many entries along its first axis, zeros behind its own.

    What numpy.pad gives as well, in a tenth of its time.
    """
    longer = np.zeros((length, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


@dataclass(frozen=True, slots=True)
class PrimitiveTable:
    """Where the tensors of one primitive lie, by place in the base and adapter slot.

    Attributes:
        cells: (rows, adapter_slots, fields) int64. Fields that are offsets count elements of
            ``numbers`` or, for index tensors, of ``indices``; -1 where an optional one is absent.
        numbers: (elements,) the pool, as the base's dtype.
        indices: (elements,) the same memory, as int32.
    """

    cells: Tensor
    numbers: Tensor
    indices: Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows of one batch by adapter slot; rows outside every segment are left alone.

    No row lies in two segments, so that segments can be computed in any order and at once.

    Attributes:
        start: (segments,) int32, first row.
        end: (segments,) int32, one past the last row.
        adapter_slot: (segments,) int32.
        weight: (segments,) float32, what a request multiplies its adapter's correction by.
        rows: (n,) int64, every row that is in a segment.
        max_rows: Rows of the longest segment, known without looking at the tensors.
        max_inner: Bound on the inner width (a rank, say) of these adapters' cells.
    """

    start: Tensor
    end: Tensor
    adapter_slot: Tensor
    weight: Tensor
    rows: Tensor
    max_rows: int
    max_inner: int

    @classmethod
    def of(
        cls,
        ranges: Sequence[tuple[int, int, int, float]],
        max_inner: int = 0,
        place: Place = torch.from_numpy,
        bucket: int | None = None,
        fine: bool = False,
    ) -> "Segments":
        """Segments of known rows, on the device; see ``SegmentLayout.of``."""
        return SegmentLayout.of(ranges, max_inner, bucket, fine).placed(place)


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """Segments as the host knows them.

    Attributes:
        columns: (4, segments) int32: start, end, adapter slot, and the bits of the float32 weight.
        rows: (n,) int64, every row that is in a segment.
        max_rows: See ``Segments``.
        max_inner: See ``Segments``.
    """

    columns: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    max_rows: int
    max_inner: int

    @classmethod
    def of(
        cls,
        ranges: Sequence[tuple[int, int, int, float]],
        max_inner: int = 0,
        bucket: int | None = None,
        fine: bool = False,
    ) -> "SegmentLayout":
        """Segments of known rows.

        Args:
            ranges: First row, one past the last, adapter slot and weight of each.
            max_inner: Of their adapters.
            bucket: Rows of a captured step, whose shapes and bounds stay as they are from batch to
                batch: empty segments are added until there are as many as rows, and ``rows`` names
                every row, those of no segment last.
            fine: Whether such bounds have more grades, and empty segments are added up to a power
                of four only: for a GPU, which starts programs for all that there could be.
        """
        table = np.array(ranges, dtype=np.float64).reshape(-1, 4)
        columns = np.empty(table.shape, dtype=np.int32)
        columns[:, :3] = table[:, :3]
        columns[:, 3] = table[:, 3].astype(np.float32).view(np.int32)
        lengths = (columns[:, 1] - columns[:, 0]).clip(min=0)
        max_rows = int(lengths.max(initial=0))
        first_of_each = np.repeat(columns[:, 0] - (lengths.cumsum() - lengths), lengths)
        rows = np.arange(lengths.sum()) + first_of_each
        if bucket is not None:
            columns = _lengthened(columns, _room(len(columns), bucket) if fine else bucket)
            free = np.ones(bucket, dtype=np.bool_)
            free[rows] = False
            rows = np.concatenate((rows, np.flatnonzero(free)))
            grades = (1, 4, 16) if fine else (1, 16)
            max_rows = next((bound for bound in grades if max_rows <= bound < bucket), bucket)
            max_inner = 1 << max(max_inner - 1, 0).bit_length() if max_inner else 0
        return cls(columns.T.copy(), rows.astype(np.int64), max_rows, max_inner)

    def placed(self, place: Place) -> Segments:
        """The same on the device."""
        start, end, slot, weight = place(self.columns).unbind(0)
        weight = weight.view(torch.float32)
        rows = place(self.rows)
        return Segments(start, end, slot, weight, rows, self.max_rows, self.max_inner)


def _room(count: int, most: int) -> int:
    """4, 16, 64, ..., up to ``most``: the first that holds so many."""
    room = 4
    while room < count:
        room *= 4
    return min(room, most)


@dataclass(frozen=True, slots=True)
class SiteTargets:
    """The targets of one GEMM: table rows ``first .. first + len(out_starts)``.

    Attributes:
        first: Table row of the first target.
        out_starts: First output column of each target.
        out_sizes: Output columns of each target.
    """

    first: int
    out_starts: tuple[int, ...]
    out_sizes: tuple[int, ...]


CorrectLinear = Callable[[Tensor, Tensor, PrimitiveTable, SiteTargets, Segments], None]
"""correct(y, x, table, targets, segments): y (rows, out), the site's base output for x (rows, in),
is changed in place; x and y are dense in their last dimension and may be strided over rows."""
