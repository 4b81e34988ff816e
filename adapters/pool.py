"""The device tier: adapters side by side in one flat buffer, each tensor as large as it is.

The buffer is allocated once and never moves, so that the table handed to the kernels stays valid.
Installing an adapter writes its tensors and a column of each table; removing it clears the column.
"""

from collections.abc import Sequence

import torch

from ..kernels.low_rank.op import LowRankTable
from .extents import ExtentError, Extents
from .layout import BaseLayout
from .primitives import ALIGNMENT_BYTES, LoweredAdapter, LowRank, Primitive


class AdapterPool:
    """Adapters resident on the device, by adapter slot.

    Args:
        layout: The base, whose targets are the rows of the tables.
        num_slots: Adapters that may be resident at once.
        capacity_bytes: Size of the buffer.
        dtype: Of the base and of every adapter.
        device: Where the base lives.

    Attributes:
        table: What the low-rank kernels read; the same object for the pool's whole life.
    """

    def __init__(
        self,
        layout: BaseLayout,
        num_slots: int,
        capacity_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the buffer, whose pages cost nothing until they are written, and the tables."""
        self._itemsize = dtype.itemsize
        self._extents = Extents(capacity_bytes // self._itemsize, ALIGNMENT_BYTES // self._itemsize)
        self._free_slots = list(reversed(range(num_slots)))
        self._starts: dict[int, list[int]] = {}
        self._bytes_in: dict[int, int] = {}
        shape = (sum(1 for _ in layout.iter_targets()), num_slots)
        self.table = LowRankTable(
            pool=torch.empty(self._extents.capacity, dtype=dtype, device=device),
            rank=torch.zeros(shape, dtype=torch.int32, device=device),
            a_offset=torch.zeros(shape, dtype=torch.int64, device=device),
            b_offset=torch.zeros(shape, dtype=torch.int64, device=device),
            bias_offset=torch.full(shape, -1, dtype=torch.int64, device=device),
        )

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the buffer."""
        return self._extents.capacity * self._itemsize

    def fits_at_all(self, adapter: LoweredAdapter) -> bool:
        """Whether the adapter fits into the pool when nothing else is in it."""
        return adapter.num_device_bytes <= self.capacity_bytes

    def evictions_for(self, adapter: LoweredAdapter, candidates: Sequence[int]) -> int | None:
        """How many slots, taken from ``candidates`` in order, must be removed to install it.

        None if all of them are not enough. Nothing is changed.
        """
        # Asked in every step for every adapter that waits, and mostly in vain: sizes come first.
        room = self._extents.free * self._itemsize + sum(
            map(self._bytes_in.__getitem__, candidates)
        )
        if adapter.num_device_bytes > room or not (self._free_slots or candidates):
            return None
        trial, sizes = self._extents.copy(), _sizes(adapter)
        for removed in range(len(candidates) + 1):
            if removed:
                trial.release(self._starts[candidates[removed - 1]])
            if len(self._free_slots) + removed and trial.allocate(sizes) is not None:
                return removed
        return None

    def install(self, adapter: LoweredAdapter) -> int | None:
        """Copy the adapter to the device: its slot, or None with nothing changed if no room is."""
        starts = self._extents.allocate(_sizes(adapter)) if self._free_slots else None
        if starts is None:
            return None
        slot = self._free_slots.pop()
        self._starts[slot] = starts
        self._bytes_in[slot] = adapter.num_device_bytes
        for start, tensor in zip(starts, adapter.tensors, strict=True):
            self.table.pool[start : start + tensor.numel()].copy_(tensor.reshape(-1))
        self._write_columns(adapter.primitives, starts, slot)
        return slot

    def remove(self, slot: int) -> None:
        """Free the slot and its memory.

        Raises:
            ExtentError: The slot is empty.
        """
        if slot not in self._starts:
            raise ExtentError(f"adapter slot {slot} is empty")
        self._extents.release(self._starts.pop(slot))
        del self._bytes_in[slot]
        self._free_slots.append(slot)
        self.table.rank[:, slot] = 0
        self.table.bias_offset[:, slot] = -1

    def check_integrity(self) -> None:
        """Raise ExtentError unless slots, extents and tables agree."""
        self._extents.check_integrity()
        used = (self._extents.capacity - self._extents.free) * self._itemsize
        if used != sum(self._bytes_in.values()):
            raise ExtentError(f"adapters of {self._bytes_in} bytes take {used}")
        num_slots = self.table.rank.shape[1]
        if sorted([*self._free_slots, *self._starts]) != list(range(num_slots)):
            raise ExtentError("some adapter slot is neither free nor in use, or both")
        if bool(self.table.rank[:, self._free_slots].any()):
            raise ExtentError("a free adapter slot has a rank")
        if bool((self.table.bias_offset[:, self._free_slots] != -1).any()):
            raise ExtentError("a free adapter slot has a bias")

    def _write_columns(
        self, primitives: Sequence[Primitive], starts: Sequence[int], slot: int
    ) -> None:
        """Build each table's column on the host and write it at once."""
        num_targets = self.table.rank.shape[0]
        rank, a_offset, b_offset = ([0] * num_targets for _ in range(3))
        bias_offset = [-1] * num_targets
        next_start = iter(starts)
        for primitive in primitives:
            row = primitive.target.index
            if isinstance(primitive, LowRank):
                rank[row] = primitive.rank
                a_offset[row], b_offset[row] = next(next_start), next(next_start)
            else:
                bias_offset[row] = next(next_start)
        for table, column in (
            (self.table.rank, rank),
            (self.table.a_offset, a_offset),
            (self.table.b_offset, b_offset),
            (self.table.bias_offset, bias_offset),
        ):
            table[:, slot] = torch.tensor(column, dtype=table.dtype).to(table.device)


def _sizes(adapter: LoweredAdapter) -> list[int]:
    return [tensor.numel() for tensor in adapter.tensors]
