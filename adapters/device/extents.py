"""Who owns which part of a flat pool: first fit over free extents that merge when they touch.

Free of torch. Whatever is freed merges with its free neighbours at once, so an empty pool is one
extent again; and because each tensor has an extent of its own, holes between adapters stay usable.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Self


class ExtentError(LookupError):
    """The books were asked for the impossible, or do not balance: a bug, not a full pool."""


class Extents:
    """Allocator over the offsets 0 .. capacity.

    Args:
        capacity: Units to manage; what does not fill an alignment step is left out.
        alignment: Every extent starts at a multiple of it and takes a multiple of it.
    """

    def __init__(self, capacity: int, alignment: int) -> None:
        """Start with one free extent."""
        self.alignment = alignment
        self.capacity = capacity - capacity % alignment
        self.free = self.capacity
        self._starts = [0] if self.capacity else []
        self._sizes = [self.capacity] if self.capacity else []
        self._used: dict[int, int] = {}

    def padded(self, size: int) -> int:
        """Units that an extent of ``size`` takes."""
        return -(-size // self.alignment) * self.alignment

    def allocate(self, sizes: Sequence[int]) -> list[int] | None:
        """One extent per size, all or none: their starts, or None with nothing changed."""
        if sum(map(self.padded, sizes)) > self.free:
            return None
        starts: list[int] = []
        for size in sizes:
            start = self._allocate_one(self.padded(size))
            if start is None:
                self.release(starts)
                return None
            starts.append(start)
        return starts

    def release(self, starts: Sequence[int]) -> None:
        """Free extents by their starts.

        Raises:
            ExtentError: No extent in use starts there.
        """
        for start in starts:
            self._release_one(start)

    def copy(self) -> Self:
        """The same books, to try something out on."""
        twin = type(self)(self.capacity, self.alignment)
        twin.free = self.free
        twin._starts, twin._sizes = self._starts.copy(), self._sizes.copy()
        twin._used = self._used.copy()
        return twin

    def check_integrity(self) -> None:
        """Raise ExtentError unless the extents tile the capacity and free ones are merged."""
        free = dict(zip(self._starts, self._sizes, strict=True))
        position, was_free = 0, False
        for start, size in sorted([*free.items(), *self._used.items()]):
            is_free = start in free
            if start != position or size <= 0 or (is_free and was_free):
                raise ExtentError(f"the extent at {start} of {size} does not follow {position}")
            position, was_free = start + size, is_free
        if position != self.capacity or sum(self._sizes) != self.free:
            raise ExtentError(f"extents cover {position} of {self.capacity}, {self.free} free")

    def _allocate_one(self, size: int) -> int | None:
        index = next((i for i, free in enumerate(self._sizes) if free >= size), None)
        if size <= 0 or index is None:
            return None
        start = self._starts[index]
        self._starts[index] += size
        self._sizes[index] -= size
        if not self._sizes[index]:
            del self._starts[index], self._sizes[index]
        self._used[start] = size
        self.free -= size
        return start

    def _release_one(self, start: int) -> None:
        size = self._used.pop(start, None)
        if size is None:
            raise ExtentError(f"no extent in use starts at {start}")
        self.free += size
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and start + size == self._starts[index]:
            size += self._sizes[index]
            del self._starts[index], self._sizes[index]
        if index and self._starts[index - 1] + self._sizes[index - 1] == start:
            self._sizes[index - 1] += size
        else:
            self._starts.insert(index, start)
            self._sizes.insert(index, size)
