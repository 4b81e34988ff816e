"""Sequences that wait to run, kept in the order in which they are to be admitted."""

from bisect import bisect_left, insort
from operator import attrgetter

from .sequence import Sequence

_order = attrgetter("order")


class WaitingQueue:
    """Ordered by (priority, arrival). Insertion by bisection: nothing is ever sorted anew."""

    def __init__(self) -> None:
        """Start empty."""
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        """Sequences waiting."""
        return len(self._sequences)

    def __getitem__(self, position: int) -> Sequence:
        """The sequence with ``position`` others before it."""
        return self._sequences[position]

    def add(self, sequence: Sequence) -> None:
        """Put the sequence in its place, behind those of equal order."""
        insort(self._sequences, sequence, key=_order)

    def pop(self, position: int) -> Sequence:
        """Remove and return the sequence at ``position``."""
        return self._sequences.pop(position)

    def remove(self, sequence: Sequence) -> None:
        """Remove the sequence from wherever it waits.

        Raises:
            ValueError: It does not wait.
        """
        position = bisect_left(self._sequences, sequence.order, key=_order)
        del self._sequences[self._sequences.index(sequence, position)]

    def count_overtaken(self, num_overtaken: int) -> None:
        """Note that a sequence behind the first ``num_overtaken`` was admitted before them."""
        for position in range(num_overtaken):
            self._sequences[position].num_overtaken += 1
