"""The device tier: adapters side by side in one flat buffer, each tensor as large as it is.

The buffer is allocated once and never moves, so that the tables handed to the kernels stay valid.
Installing an adapter writes its tensors and a cell per primitive; removing it empties the cells.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.memory import allocator
from ...kernels.tables import PrimitiveTable
from ..layout import BaseLayout
from ..primitives.lowered import PRIMITIVE_TYPES, LoweredAdapter, Part
from ..primitives.primitive import ALIGNMENT_BYTES, Primitive
from .copies import make_copies
from .extents import ExtentError, Extents
from .residency import PoolSize

_EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where one adapter is on the device.

    Attributes:
        slots: An adapter slot for each of its parts.
        starts: Where its tensors begin in the buffer, in bytes.
        num_bytes: What they take.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    num_bytes: int


class AdapterPool:
    """Adapters resident on the device, by adapter slot.

    Args:
        layout: The base, whose places are the rows of the tables.
        num_slots: Parts of adapters that may be resident at once.
        capacity_bytes: Size of the buffer.
        dtype: Of the base and of every number stored.
        device: Where the base lives.

    Attributes:
        tables: What the kernels read, by type of primitive; the same objects for the pool's life.
        device: Where the base lives.
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
        self.device = device
        self._num_slots = num_slots
        self._extents = Extents(capacity_bytes, ALIGNMENT_BYTES)
        self._free_slots = list(reversed(range(num_slots)))
        self._placements: set[Placement] = set()
        self._inner_sizes: dict[int, Mapping[type[Primitive], int]] = {}
        self._head_path = layout.head_path
        self._at_head: set[int] = set()
        self._copies = make_copies(device)
        capacity = self._extents.capacity
        self._buffer = allocator(device, capacity)((capacity,), torch.uint8)
        numbers, indices = self._buffer.view(dtype), self._buffer.view(torch.int32)
        self.tables: Mapping[type[Primitive], PrimitiveTable] = {
            each: PrimitiveTable(_empty_cells(each, layout, num_slots, device), numbers, indices)
            for each in PRIMITIVE_TYPES
        }
        self._occupied: Mapping[type[Primitive], npt.NDArray[np.bool_]] = {
            each: np.zeros((each.num_rows(layout), num_slots), dtype=np.bool_)
            for each in PRIMITIVE_TYPES
        }

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the buffer."""
        return self._extents.capacity

    def types_in(self, slot: int) -> Collection[type[Primitive]]:
        """The types of the primitives of the part in this slot."""
        return self._inner_sizes[slot].keys()

    def inner_of(self, kind: type[Primitive], slots: Sequence[int]) -> int:
        """The largest inner width of this type's primitives in the slots, each of which has one."""
        return max(self._inner_sizes[slot][kind] for slot in slots)

    def rows_of(self, kind: type[Primitive], slots: Sequence[int]) -> tuple[bool, ...]:
        """Of every row of the type's table, whether any of the slots has a cell there."""
        occupied: npt.NDArray[np.bool_] = np.any(self._occupied[kind][:, list(slots)], axis=1)
        return tuple(occupied.tolist())

    @property
    def changes_any_head(self) -> bool:
        """Whether the part in any slot corrects the head's output."""
        return bool(self._at_head)

    def changes_head(self, slot: int) -> bool:
        """Whether the part in this slot corrects the head's output."""
        return slot in self._at_head

    def size(self, adapter: LoweredAdapter) -> PoolSize:
        """What the adapter takes."""
        return PoolSize(adapter.num_device_bytes, len(adapter.parts))

    def fits_at_all(self, adapter: LoweredAdapter) -> bool:
        """Whether the adapter fits into the pool when nothing else is in it."""
        return (
            adapter.num_device_bytes <= self.capacity_bytes
            and len(adapter.parts) <= self._num_slots
        )

    def evictions_for(self, adapter: LoweredAdapter, candidates: Sequence[Placement]) -> int | None:
        """How many adapters, taken from ``candidates`` in order, must be removed to install it.

        None if all of them are not enough. Nothing is changed.
        """
        # Asked in every step for every adapter that waits, and mostly in vain: sizes come first.
        room = self._extents.free + sum(each.num_bytes for each in candidates)
        slots = len(self._free_slots) + sum(len(each.slots) for each in candidates)
        if adapter.num_device_bytes > room or len(adapter.parts) > slots:
            return None
        trial, sizes, slots = self._extents.copy(), _sizes(adapter), len(self._free_slots)
        for removed in range(len(candidates) + 1):
            if removed:
                trial.release(candidates[removed - 1].starts)
                slots += len(candidates[removed - 1].slots)
            if len(adapter.parts) <= slots and trial.allocate(sizes) is not None:
                return removed
        return None

    def install(self, adapter: LoweredAdapter) -> Placement | None:
        """Copy the adapter to the device; None with nothing changed if there is no room."""
        if len(adapter.parts) > len(self._free_slots):
            return None
        starts = self._extents.allocate(_sizes(adapter))
        if starts is None:
            return None
        start_of = dict(zip(map(id, adapter.tensors), starts, strict=True))
        for tensor in adapter.tensors:
            start = start_of[id(tensor)]
            to = self._buffer[start : start + tensor.nbytes].view(tensor.dtype)
            self._copies.copy(to, tensor.reshape(-1))
        slots = tuple(self._free_slots.pop() for _ in adapter.parts)
        for slot, part in zip(slots, adapter.parts, strict=True):
            self._write_cells(part, slot, start_of)
        placement = Placement(slots, tuple(starts), adapter.num_device_bytes)
        self._placements.add(placement)
        return placement

    def wait_for_copies(self) -> None:
        """What is launched from now on finds every installed adapter."""
        self._copies.wait()

    def remove(self, placement: Placement) -> None:
        """Free the adapter's slots and memory.

        Raises:
            ExtentError: It is not here.
        """
        if placement not in self._placements:
            raise ExtentError(f"the adapter in the slots {placement.slots} is not in the pool")
        self._placements.remove(placement)
        self._extents.release(placement.starts)
        for slot in placement.slots:
            for kind in self._inner_sizes.pop(slot):
                self.tables[kind].cells[:, slot] = _EMPTY
                self._occupied[kind][:, slot] = False
            self._at_head.discard(slot)
            self._free_slots.append(slot)

    def check_integrity(self) -> None:
        """Raise ExtentError unless slots, extents and tables agree."""
        self._extents.check_integrity()
        used = self._extents.capacity - self._extents.free
        if used != sum(each.num_bytes for each in self._placements):
            raise ExtentError(f"adapters take {used} bytes, and their placements others")
        taken = [slot for each in self._placements for slot in each.slots]
        if sorted([*self._free_slots, *taken]) != list(range(self._num_slots)):
            raise ExtentError("some adapter slot is neither free nor in use, or both")
        if sorted(self._inner_sizes) != sorted(taken):
            raise ExtentError("the types of a free adapter slot are known, or of one in use not")
        for kind, table in self.tables.items():
            if ((table.cells[:, :, 0] != _EMPTY).cpu().numpy() != self._occupied[kind]).any():
                raise ExtentError(f"the table of {kind.__name__} differs from its books")

    def _write_cells(self, part: Part, slot: int, start_of: Mapping[int, int]) -> None:
        """Build each table's column on the host and write it at once."""
        columns: dict[type[Primitive], dict[int, tuple[int, ...]]] = {}
        for each in part.primitives:
            offsets = [start_of[id(tensor)] // tensor.itemsize for tensor in each.tensors]
            columns.setdefault(type(each), {})[each.row] = each.cell(offsets)
            if each.path == self._head_path:
                self._at_head.add(slot)
        self._inner_sizes[slot] = {
            kind: max(each.inner_size for each in part.primitives if type(each) is kind)
            for kind in columns
        }
        for kind, cells in columns.items():
            rows = list(cells)
            values = torch.tensor(list(cells.values()), dtype=torch.int64)
            column = self.tables[kind].cells[:, slot]
            index = torch.tensor(rows).to(self.device, non_blocking=True)
            column[index] = values.to(self.device, non_blocking=True)
            self._occupied[kind][rows, slot] = True


def _empty_cells(
    kind: type[Primitive], layout: BaseLayout, num_slots: int, device: torch.device
) -> torch.Tensor:
    shape = (kind.num_rows(layout), num_slots, kind.num_fields())
    return torch.full(shape, _EMPTY, dtype=torch.int64, device=device)


def _sizes(adapter: LoweredAdapter) -> list[int]:
    return [tensor.nbytes for tensor in adapter.tensors]
