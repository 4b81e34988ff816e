"""The sequences that run, and what each tenant holds by them.

What running sequences occupy (seats of a step, cache blocks, adapters) is shared by weight. Nobody
is kept from more than its share while nobody else wants it; when somebody does, who holds the most
for its weight gives back first, its last-come sequence before others.
"""

from collections.abc import Callable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from operator import attrgetter

from .beam_group import rows_of
from .sequence import Sequence

Measure = Callable[[Sequence], int]
"""What a sequence occupies of something."""

_order = attrgetter("order")


@dataclass(slots=True)
class Holding:
    """What a tenant's running sequences occupy.

    Attributes:
        weight: The tenant's.
        used: The sum over its sequences.
        requests: Of these sequences; the beams of a search are one.
    """

    weight: float
    used: int = 0
    requests: set[str] = field(default_factory=set)

    @property
    def relative(self) -> float:
        """What it occupies for its weight."""
        return self.used / self.weight


class RunningSequences(Mapping[tuple[str, int], Sequence]):
    """By name, in the order in which they began to run.

    Attributes:
        num_rows: Rows of a step that are kept for them.
    """

    def __init__(self) -> None:
        """Start with none."""
        self.num_rows = 0
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._rows: dict[Sequence, int] = {}

    def __getitem__(self, name: tuple[str, int]) -> Sequence:
        """The sequence of that name."""
        return self._sequences[name]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Their names."""
        return iter(self._sequences)

    def __len__(self) -> int:
        """How many run, each beam one of them."""
        return len(self._sequences)

    def values(self) -> ValuesView[Sequence]:
        """The sequences: the dictionary's own view, as every step walks it."""
        return self._sequences.values()

    def has(self, sequence: Sequence) -> bool:
        """Whether this very sequence runs."""
        return sequence in self._rows

    def add(self, sequence: Sequence) -> None:
        """The sequence runs from now on."""
        self._sequences[sequence.name] = sequence
        self._rows[sequence] = 0
        self.recount(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence runs no more."""
        del self._sequences[sequence.name]
        self.num_rows -= self._rows.pop(sequence)

    def recount(self, sequence: Sequence) -> None:
        """Count the rows kept for it anew: those of a search are its beams' once it has forked."""
        self.num_rows += rows_of(sequence) - self._rows[sequence]
        self._rows[sequence] = rows_of(sequence)

    def rows(self, sequence: Sequence) -> int:
        """Rows of a step that are kept for the sequence."""
        return self._rows[sequence]

    def runs(self, tenant: str) -> bool:
        """Whether any sequence of the tenant runs."""
        return any(each.tenant == tenant for each in self._sequences.values())

    def holdings(self, measure: Measure) -> dict[str, Holding]:
        """What each tenant holds."""
        holdings: dict[str, Holding] = {}
        for each in self._sequences.values():
            share = each.request.share
            holding = holdings.setdefault(share.tenant, Holding(share.weight))
            holding.used += measure(each)
            holding.requests.add(each.request.request_id)
        return holdings

    def of_tenant(self, tenant: str) -> list[Sequence]:
        """The tenant's, the last-come first."""
        own = (each for each in self._sequences.values() if each.tenant == tenant)
        return sorted(own, key=_order, reverse=True)

    def last(self, measure: Measure) -> Sequence:
        """Whom to take off the device: the last-come of the tenant that holds the most.

        A tenant keeps one request while others have several. Where each has one, the last-come
        goes, so that the first comes to its end.
        """
        holdings = self.holdings(measure)
        several = [tenant for tenant, one in holdings.items() if len(one.requests) > 1]
        if len(holdings) > 1 and not several:
            return max(self._sequences.values(), key=attrgetter("arrival"))
        tenant = max(several or holdings, key=lambda tenant: holdings[tenant].relative)
        return self.of_tenant(tenant)[0]
