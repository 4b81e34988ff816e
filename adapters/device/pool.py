"""The device tier: adapters side by side in one flat memory, each tensor as large as it is.

The memory is shared with the cache blocks. It never moves, so that the tables handed to the kernels
stay valid: the blocks are numbered from its beginning, and adapters lie within ``limit_bytes`` of
its end. Installing an adapter writes its tensors and a cell per primitive; removing it empties the
cells. Between two steps tensors may be moved together, which rewrites the cells: so what is free
can always be used, by an adapter or by blocks.

Index tensors that are alike lie there once. Still every adapter counts with all it has, so that its
going frees the same whoever stays.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.tables import PrimitiveTable
from ..layout import BaseLayout
from ..primitives.lowered import LoweredAdapter, Part
from ..primitives.primitive import ALIGNMENT_BYTES, Primitive
from .alike import AlikeExtents
from .copies import make_copies
from .extents import ExtentError, Extents, Move
from .residency import PoolSize

_EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """One adapter on the device.

    Attributes:
        slots: An adapter slot for each of its parts.
        size: What it takes.
    """

    slots: tuple[int, ...]
    size: PoolSize


@dataclass(frozen=True, slots=True)
class _Column:
    """An adapter slot's cells in one table, whatever its tensors' places.

    Attributes:
        rows: Of the table.
        cells: (rows, fields) int64; -2 - i stands for the place of the adapter's ith tensor.
    """

    rows: Sequence[int]
    cells: npt.NDArray[np.int64]

    def at(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The cells for tensors at these places, in elements."""
        is_place = self.cells < _EMPTY
        return np.where(is_place, places[np.where(is_place, -2 - self.cells, 0)], self.cells)


@dataclass(slots=True)
class _Installed:
    """What the pool knows of an adapter.

    Attributes:
        extents: Where its tensors are.
        item_sizes: Bytes of a number of each tensor.
        columns: Its cells by slot and table.
    """

    extents: list[int]
    item_sizes: Sequence[int]
    columns: Mapping[int, Mapping[type[Primitive], _Column]]


class AdapterPool:
    """Adapters resident on the device, by adapter slot.

    Args:
        layout: The base, whose places are the rows of the tables.
        num_slots: Parts of adapters that may be resident at once.
        memory: (bytes,) uint8 on the device.
        dtype: Of the base and of every number stored.

    Attributes:
        device: Where the base lives.
        limit_bytes: Of the memory, from its end, in which adapters may lie; all of it at first.
        generation: Grows whenever what a slot holds changes.
    """

    def __init__(
        self, layout: BaseLayout, num_slots: int, memory: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Start with nothing installed; the memory costs nothing until it is written."""
        self.device = memory.device
        self._num_slots = num_slots
        self._extents = Extents(len(memory), ALIGNMENT_BYTES)
        self._alike = AlikeExtents()
        self._counted_bytes = 0
        self.limit_bytes = self._extents.capacity
        self.generation = 0
        self._free_slots = list(reversed(range(num_slots)))
        self._installed: dict[Placement, _Installed] = {}
        self._inner_sizes: dict[int, Mapping[type[Primitive], int]] = {}
        self._at_head: set[int] = set()
        self._copies = make_copies(self.device)
        self._memory = memory[: self._extents.capacity]
        self._layout, self._dtype = layout, dtype
        self._tables: dict[type[Primitive], PrimitiveTable] = {}
        self._occupied: dict[type[Primitive], npt.NDArray[np.bool_]] = {}

    @property
    def free_bytes(self) -> int:
        """What adapters may take beyond what they have."""
        return self.limit_bytes - self._counted_bytes

    @property
    def free(self) -> PoolSize:
        """What another adapter may take."""
        return PoolSize(self.free_bytes, len(self._free_slots))

    def table(self, kind: type[Primitive]) -> PrimitiveTable:
        """What the kernels read of this type of primitive; the same object for the pool's life.

        Made when it is first asked for: most types are never used, and each takes megabytes.
        """
        table = self._tables.get(kind)
        if table is None:
            rows, slots = kind.num_rows(self._layout), self._num_slots
            shape = (rows, slots, kind.num_fields())
            cells = torch.full(shape, _EMPTY, dtype=torch.int64, device=self.device)
            numbers, indices = self._memory.view(self._dtype), self._memory.view(torch.int32)
            table = self._tables[kind] = PrimitiveTable(cells, numbers, indices)
            self._occupied[kind] = np.zeros((rows, slots), dtype=np.bool_)
        return table

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

    def install(self, adapter: LoweredAdapter) -> Placement | None:
        """Copy the adapter to the device; None with nothing changed if there is no room."""
        size = self.size(adapter)
        if not size.within(self.free):
            return None
        extents = self._store(adapter)
        if extents is None:
            return None
        self._counted_bytes += size.num_bytes
        self.generation += 1
        placement = Placement(tuple(self._free_slots.pop() for _ in adapter.parts), size)
        index_of = {id(tensor): index for index, tensor in enumerate(adapter.tensors)}
        self._installed[placement] = _Installed(
            extents,
            [tensor.itemsize for tensor in adapter.tensors],
            {
                slot: self._columns(part, slot, index_of)
                for slot, part in zip(placement.slots, adapter.parts, strict=True)
            },
        )
        self._write_cells(self._installed[placement])
        return placement

    def resize(self, limit_bytes: int) -> None:
        """Have adapters lie within this distance of the memory's end.

        Raises:
            ExtentError: They take more than that.
        """
        if self._counted_bytes > limit_bytes:
            raise ExtentError(
                f"adapters of {self._counted_bytes} bytes do not fit into {limit_bytes}"
            )
        # What is copied from now on waits for what moves here, and the other way round.
        self.wait_for_copies()
        self._move(self._extents.settle(limit_bytes))
        self.limit_bytes = limit_bytes

    def wait_for_copies(self) -> None:
        """What is launched from now on finds every installed adapter."""
        self._copies.wait()

    def remove(self, placement: Placement) -> None:
        """Free the adapter's slots and memory.

        Raises:
            ExtentError: It is not here.
        """
        installed = self._installed.pop(placement, None)
        if installed is None:
            raise ExtentError(f"the adapter in the slots {placement.slots} is not in the pool")
        self.generation += 1
        self._counted_bytes -= placement.size.num_bytes
        self._extents.release([each for each in installed.extents if self._alike.release(each)])
        for slot in placement.slots:
            for kind in self._inner_sizes.pop(slot):
                self.table(kind).cells[:, slot] = _EMPTY
                self._occupied[kind][:, slot] = False
            self._at_head.discard(slot)
            self._free_slots.append(slot)

    def check_integrity(self) -> None:
        """Raise ExtentError unless slots, extents and tables agree."""
        self._extents.check_integrity()
        if self._extents.span > self.limit_bytes:
            raise ExtentError("an adapter lies outside the adapters' part of the memory")
        if self._counted_bytes != sum(each.size.num_bytes for each in self._installed):
            raise ExtentError("adapters take other bytes than their placements say")
        users = Counter(extent for each in self._installed.values() for extent in each.extents)
        if self._extents.used != sum(map(self._extents.size_at, users)):
            raise ExtentError("some extent is no adapter's")
        several = {extent: count for extent, count in users.items() if count > 1}
        if not several.items() <= self._alike.holders().items() <= users.items():
            raise ExtentError("some tensor is held by other adapters than have it")
        taken = [slot for each in self._installed for slot in each.slots]
        if sorted([*self._free_slots, *taken]) != list(range(self._num_slots)):
            raise ExtentError("some adapter slot is neither free nor in use, or both")
        if sorted(self._inner_sizes) != sorted(taken):
            raise ExtentError("the types of a free adapter slot are known, or of one in use not")
        for kind, table in self._tables.items():
            if ((table.cells[:, :, 0] != _EMPTY).cpu().numpy() != self._occupied[kind]).any():
                raise ExtentError(f"the table of {kind.__name__} differs from its books")

    def _store(self, adapter: LoweredAdapter) -> list[int] | None:
        """Where each of its tensors lies, copied unless it was there; None if there is no room."""
        tensors = list(zip(adapter.tensors, adapter.index_digests, strict=True))
        missing = {
            id(tensor) if content is None else content: tensor
            for tensor, content in tensors
            if content not in self._alike
        }
        extents = self._allocate([tensor.nbytes for tensor in missing.values()])
        if extents is None:
            return None
        new = dict(zip(missing, extents, strict=True))
        for key, tensor in missing.items():
            to = self._at(new[key], tensor.nbytes).view(tensor.dtype)
            self._copies.copy(to, tensor.reshape(-1))
            if isinstance(key, bytes):
                self._alike.add(key, new[key])
        return [
            new[id(tensor)] if content is None else self._alike.hold(content)
            for tensor, content in tensors
        ]

    def _allocate(self, sizes: Sequence[int]) -> list[int] | None:
        extents = self._extents.allocate(sizes, self.limit_bytes)
        if extents is None:
            self.wait_for_copies()
            self._move(self._extents.pack())
            extents = self._extents.allocate(sizes, self.limit_bytes)
        return extents

    def _address(self, extent: int, size: int) -> int:
        """Extents are counted from the memory's end: the nearest are lent to blocks last."""
        return self._extents.capacity - extent - self._extents.padded(size)

    def _at(self, extent: int, size: int) -> torch.Tensor:
        start = self._address(extent, size)
        return self._memory[start : start + size]

    def _move(self, moves: Sequence[Move]) -> None:
        """Copy what lies elsewhere now, and tell the tables."""
        if not moves:
            return
        moved: dict[int, int] = {}
        came_from: dict[int, int] = {}
        for source, target, size in moves:
            data = self._at(source, size)
            overlap = abs(source - target) < size
            self._at(target, size).copy_(data.clone() if overlap else data)
            first = came_from.pop(source, source)
            moved[first], came_from[target] = target, first
        self._alike.move(moved)
        for installed in self._installed.values():
            if not moved.keys().isdisjoint(installed.extents):
                installed.extents = [moved.get(extent, extent) for extent in installed.extents]
                self._write_cells(installed)

    def _columns(
        self, part: Part, slot: int, index_of: Mapping[int, int]
    ) -> Mapping[type[Primitive], _Column]:
        """The slot's cells in each table, by the places of the adapter's tensors to come."""
        columns: dict[type[Primitive], dict[int, tuple[int, ...]]] = {}
        for each in part.primitives:
            places = [-2 - index_of[id(tensor)] for tensor in each.tensors]
            columns.setdefault(type(each), {})[each.row] = each.cell(places)
            if each.path == self._layout.head_path:
                self._at_head.add(slot)
        self._inner_sizes[slot] = {
            kind: max(each.inner_size for each in part.primitives if type(each) is kind)
            for kind in columns
        }
        return {
            kind: _Column(list(cells), np.array(list(cells.values()), dtype=np.int64))
            for kind, cells in columns.items()
        }

    def _write_cells(self, installed: _Installed) -> None:
        """Each table's column, built on the host and written at once."""
        sizes = [self._extents.size_at(extent) for extent in installed.extents]
        addresses = map(self._address, installed.extents, sizes)
        pairs = zip(addresses, installed.item_sizes, strict=True)
        places = np.array([address // item for address, item in pairs], dtype=np.int64)
        for slot, columns in installed.columns.items():
            for kind, each in columns.items():
                column = self.table(kind).cells[:, slot]
                values = torch.from_numpy(each.at(places))
                index = torch.tensor(each.rows).to(self.device, non_blocking=True)
                column[index] = values.to(self.device, non_blocking=True)
                self._occupied[kind][each.rows, slot] = True
