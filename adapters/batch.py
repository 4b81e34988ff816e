"""The adapters of one step: which rows get which correction."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels.low_rank.op import AddLowRank, LowRankTable, Segments, SiteTargets


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """Corrections for the rows of one forward pass; a pass without adapters has none of these."""

    table: LowRankTable
    segments: Segments
    add_low_rank: AddLowRank

    def add(self, y: Tensor, x: Tensor, targets: SiteTargets) -> None:
        """Correct y (rows, out), the site's base output for x (rows, in), in place."""
        self.add_low_rank(y, x, self.table, targets, self.segments)


def group_rows(adapter_slots: Sequence[int | None]) -> list[tuple[int, int, int]]:
    """Maximal runs of equal adapter slots as (start, end, slot); rows of the base (None) in none.

    The runner orders a step's rows by adapter slot, so that every adapter gets one segment.
    """
    groups: list[tuple[int, int, int]] = []
    start = 0
    for row in range(1, len(adapter_slots) + 1):
        if row == len(adapter_slots) or adapter_slots[row] != adapter_slots[start]:
            slot = adapter_slots[start]
            if slot is not None:
                groups.append((start, row, slot))
            start = row
    return groups
