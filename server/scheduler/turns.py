"""Who is next, in one pass over those who wait.

The tenant with the smallest counter comes first, and of its line the first; the rest follows from
what becomes of them.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from .counters import ServiceCounters
from .sequence import Sequence
from .waiting import TENANTS, WaitingQueue

Order = Callable[[Seq[Sequence]], Iterable[int]]
"""Positions in (the beginning of) a tenant's line in the order in which to admit."""


def in_line(waiting: Seq[Sequence]) -> Iterable[int]:
    """One after the other."""
    return range(len(waiting))


class Turns:
    """One pass over the queue: who may be admitted next, given what became of those before.

    Every sequence that ``next`` returns is answered by one of ``admitted``, ``pass_over``,
    ``set_aside`` and ``hold_back``. ``close`` ends the pass.

    Args:
        queue: The lines.
        counters: Whose turn it is.
        slack: Service that one tenant may be ahead of another that waits for room, and still pass.
        order: Within each line.
    """

    def __init__(
        self, queue: WaitingQueue, counters: ServiceCounters, slack: float, order: Order = in_line
    ) -> None:
        """Begin with the tenant whose turn it is."""
        self._queue = queue
        self._counters = counters
        self._slack = slack
        self._order = order
        self._lines: dict[str, _Line] = {}
        self._aside: set[str] = set()
        self._held_back: float | None = None
        """The counter of the first tenant that lacks room."""
        self._hanging: list[Sequence] = []
        self._overtaken: set[Sequence] = set()

    def next(self) -> Sequence | None:
        """The next candidate; None if nobody is left."""
        while len(self._aside) < TENANTS and (tenant := self._counters.first()) is not None:
            if tenant not in self._aside:
                candidate = self._candidate(tenant)
                if candidate is not None and self._may_pass(candidate):
                    return candidate
                self._aside.add(tenant)
            self._counters.step_out()
        return None

    def admitted(self, sequence: Sequence) -> None:
        """It runs: those of its tenant before it were overtaken, and those of others that hang."""
        self._line(sequence.tenant).take()
        self._overtaken.update(each for each in self._hanging if each.tenant != sequence.tenant)

    def pass_over(self, sequence: Sequence, hangs: bool = False) -> None:
        """Go on with the next of its tenant.

        ``hangs`` says that nothing of its tenant runs: then it counts who of others passes it.
        """
        self._line(sequence.tenant).skip()
        if hangs:
            self._hanging.append(sequence)

    def set_aside(self, tenant: str) -> None:
        """Nothing more of the tenant in this pass."""
        self._aside.add(tenant)

    def hold_back(self, sequence: Sequence) -> None:
        """The same; and who is well ahead of its tenant does not take the room that it lacks."""
        self._aside.add(sequence.tenant)
        if self._held_back is None:
            self._held_back = self._counters.counter(sequence.tenant)

    def close(self) -> None:
        """Put everybody back in line, and count who was overtaken."""
        self._counters.step_back()
        for sequence in self._overtaken.union(*(line.overtaken() for line in self._lines.values())):
            sequence.num_overtaken += 1

    def _candidate(self, tenant: str) -> Sequence | None:
        """The next of the tenant; what ended in this pass, as beams do together, is left out."""
        line = self._line(tenant)
        while (candidate := line.candidate()) is not None and candidate not in self._queue:
            line.skip()
        return candidate

    def _may_pass(self, candidate: Sequence) -> bool:
        if self._held_back is None:
            return True
        ahead = self._counters.counter(candidate.tenant) - self._held_back
        return ahead * candidate.request.share.weight <= self._slack

    def _line(self, tenant: str) -> "_Line":
        if tenant not in self._lines:
            waiting = self._queue.beginning(tenant)
            self._lines[tenant] = _Line(waiting, iter(self._order(waiting)))
        return self._lines[tenant]


@dataclass(slots=True)
class _Line:
    """A tenant's line as it was when the pass came to it."""

    waiting: list[Sequence]
    order: Iterator[int]
    current: int | None = None
    taken: set[int] = field(default_factory=set)

    def candidate(self) -> Sequence | None:
        if self.current is None:
            self.current = next(self.order, None)
        return None if self.current is None else self.waiting[self.current]

    def take(self) -> None:
        if self.current is not None:
            self.taken.add(self.current)
        self.current = None

    def skip(self) -> None:
        self.current = None

    def overtaken(self) -> list[Sequence]:
        passed = range(max(self.taken, default=0))
        return [self.waiting[position] for position in passed if position not in self.taken]
