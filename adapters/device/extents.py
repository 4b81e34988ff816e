"""Who owns which part of a flat pool: first fit over free extents that merge when they touch.

Free of torch. Whatever is freed merges with its free neighbours at once, so an empty pool is one
extent again; and because each tensor has an extent of its own, holes between adapters stay usable.
What first fit leaves scattered can be moved together, so that free room is never lost.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class ExtentError(LookupError):
    """The books were asked for the impossible, or do not balance: a bug, not a full pool."""


class Move(NamedTuple):
    """An extent that lies elsewhere now; the two places may overlap."""

    source: int
    target: int
    size: int


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

    @property
    def used(self) -> int:
        """Units that extents take."""
        return self.capacity - self.free

    @property
    def span(self) -> int:
        """Where the last extent ends."""
        is_free = self._starts and self._starts[-1] + self._sizes[-1] == self.capacity
        return self._starts[-1] if is_free else self.capacity

    def padded(self, size: int) -> int:
        """Units that an extent of ``size`` takes."""
        return -(-size // self.alignment) * self.alignment

    def size_at(self, start: int) -> int:
        """Units of the extent that starts there."""
        return self._used[start]

    def allocate(self, sizes: Sequence[int], limit: int) -> list[int] | None:
        """One extent per size below ``limit``, all or none: their starts, or None."""
        starts: list[int] = []
        for size in sizes:
            start = self._allocate_one(self.padded(size), limit)
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

    def settle(self, limit: int) -> list[Move]:
        """Have every extent end at ``limit``, by moves to be made in order.

        Those that lie behind it go into holes; where these are too small, all are moved together.

        Raises:
            ExtentError: They take more than that.
        """
        if self.used > limit:
            raise ExtentError(f"extents of {self.used} units do not fit into {limit}")
        moves: list[Move] = []
        for start in sorted(self._used, reverse=True):
            size = self._used[start]
            if start + size <= limit:
                return moves
            target = self._allocate_one(size, limit)
            if target is None:
                return moves + self.pack()
            self._release_one(start)
            moves.append(Move(start, target, size))
        return moves

    def pack(self) -> list[Move]:
        """Close all holes, by moves to be made in order."""
        extents, end = sorted(self._used.items()), 0
        moves: list[Move] = []
        self._used = {}
        for start, size in extents:
            if start != end:
                moves.append(Move(start, end, size))
            self._used[end] = size
            end += size
        self._starts, self._sizes = ([end], [self.free]) if self.free else ([], [])
        return moves

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

    def _allocate_one(self, size: int, limit: int) -> int | None:
        index = next((i for i, free in enumerate(self._sizes) if free >= size), None)
        if size <= 0 or index is None or self._starts[index] + size > limit:
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
