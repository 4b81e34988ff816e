"""Sequences that wait to run, kept in the order in which they are to be admitted.

Each tenant has a line of its own, ordered by (priority, deadline, arrival). Which tenant's turn it
is, its counter says.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice, zip_longest
from operator import attrgetter

from .counters import ServiceCounters
from .sequence import Sequence

WINDOW = 256
"""Sequences of a tenant that are looked at in one step, if they have to be passed over."""

TENANTS = 64
"""Tenants that are looked at in one step, if nothing of theirs can be admitted."""

_order = attrgetter("order")


class WaitingQueue:
    """The tenants' lines. Insertion by bisection: nothing is ever sorted anew."""

    def __init__(self, counters: ServiceCounters) -> None:
        """Start empty; ``counters`` are told who waits."""
        self._counters = counters
        self._lines: dict[str, list[Sequence]] = {}
        self._waiting: set[Sequence] = set()

    def __len__(self) -> int:
        """Sequences waiting."""
        return len(self._waiting)

    def __contains__(self, sequence: object) -> bool:
        """Whether the sequence waits."""
        return sequence in self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All of them: the first of each tenant, then the second of each, and so on."""
        ranks = zip_longest(*self._lines.values())
        return (sequence for rank in ranks for sequence in rank if sequence is not None)

    def add(self, sequence: Sequence) -> None:
        """Put the sequence in its place in its tenant's line, behind those of equal order."""
        tenant = sequence.tenant
        if tenant not in self._lines:
            self._lines[tenant] = []
            self._counters.join(tenant)
        insort(self._lines[tenant], sequence, key=_order)
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove the sequence from wherever it waits.

        Raises:
            KeyError: It does not wait.
        """
        self._waiting.remove(sequence)
        line = self._lines[sequence.tenant]
        position = bisect_left(line, sequence.order, key=_order)
        del line[line.index(sequence, position)]
        if not line:
            del self._lines[sequence.tenant]
            self._counters.leave(sequence.tenant)

    def first_of_each(self) -> list[Sequence]:
        """The first of each tenant that is near the front."""
        return [self._lines[tenant][0] for tenant in self._counters.near_front(TENANTS)]

    def beginning(self, tenant: str) -> list[Sequence]:
        """The first in the line of a tenant, as many as are looked at in one step."""
        return list(islice(self._lines.get(tenant, ()), WINDOW))
