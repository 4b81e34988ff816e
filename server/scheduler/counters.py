"""Virtual token counters: how much service each tenant has had, hence whose turn it is.

The algorithm is VTC of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A
tenant's counter rises by the service it is given, over its weight; the next sequence to be admitted
is one of the tenant with the smallest counter. A tenant that begins to wait is lifted to the
smallest counter among those who wait already, so that having been idle is no credit. Of two tenants
that always wait, neither gets more than a bounded amount ahead, whatever they send.

Service is counted as in the paper: a prompt token that is computed counts 1, a generated token 2.
What the prefix cache holds is not computed and counts nothing; nor does what is computed a second
time because of a preemption, which no tenant asked for.
"""

from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

from ..generation import Share
from .plan import ScheduledSequence

PROMPT_TOKEN = 1.0
OUTPUT_TOKEN = 2.0
"""Service of a token."""

Standing = tuple[float, int]
"""A tenant's counter, and when it was last served: of equals, who waited longer goes first."""


@dataclass(slots=True)
class _Account:
    """A tenant's counter; it only ever rises.

    Attributes:
        counter: Service over weight.
        served: Number of the charge that was its last.
        entry: Number of its valid entry in the line; 0 while nothing of it waits.
    """

    counter: float = 0.0
    served: int = 0
    entry: int = 0


class ServiceCounters:
    """The counters of all tenants, and the line of those that have something waiting.

    The line is a heap whose entries may be out of date. Counters only rise, so an entry that is
    stale is too early, and is put right when it comes to the front: O(log tenants) a decision.
    """

    def __init__(self) -> None:
        """Start with no tenant."""
        self._accounts: dict[str, _Account] = {}
        self._line: list[tuple[Standing, int, str]] = []
        self._out: list[str] = []
        self._entries = 0
        self._charges = 0
        self._last_counter = 0.0

    def counter(self, tenant: str) -> float:
        """Service over weight, since the tenant was last lifted from below."""
        return self.standing(tenant)[0]

    def standing(self, tenant: str) -> Standing:
        """Smaller is served earlier."""
        account = self._accounts.get(tenant, _Account())
        return account.counter, account.served

    def join(self, tenant: str) -> None:
        """Something of the tenant waits from now on; lift it over the time it was idle."""
        account = self._accounts.setdefault(tenant, _Account())
        first = self.first()
        others = self._out if first is None else [first, *self._out]
        floor = min(map(self.counter, others), default=self._last_counter)
        account.counter = max(account.counter, floor)
        self._enter(tenant, account)

    def leave(self, tenant: str) -> None:
        """Nothing of the tenant waits any more."""
        account = self._accounts[tenant]
        account.entry = 0
        self._last_counter = account.counter

    def first(self) -> str | None:
        """The tenant in the line with the smallest counter."""
        while self._line:
            standing, entry, tenant = self._line[0]
            account = self._accounts[tenant]
            if entry != account.entry:
                heappop(self._line)
            elif standing != self.standing(tenant):
                heapreplace(self._line, (self.standing(tenant), entry, tenant))
            else:
                return tenant
        return None

    def step_out(self) -> None:
        """Take the first tenant out of the line until ``step_back``."""
        self._out.append(heappop(self._line)[2])

    def step_back(self) -> None:
        """Put those that stepped out back, but for those of which nothing waits any more."""
        out, self._out = self._out, []
        for tenant in out:
            if self._accounts[tenant].entry:
                self._enter(tenant, self._accounts[tenant])

    def near_front(self, number: int) -> list[str]:
        """About the first ``number`` tenants of the line, the first among them, in no order."""
        live = (each for each in self._line[:number] if self._accounts[each[2]].entry == each[1])
        return [tenant for _, _, tenant in live]

    def charge(self, share: Share, service: float) -> None:
        """Note service given to the tenant."""
        account = self._accounts.get(share.tenant)
        if account is None:
            account = self._accounts[share.tenant] = _Account()
        account.counter += service / share.weight
        self._charges += 1
        account.served = self._charges

    def _enter(self, tenant: str, account: _Account) -> None:
        self._entries += 1
        account.entry = self._entries
        heappush(self._line, (self.standing(tenant), account.entry, tenant))


def service_of(item: ScheduledSequence) -> float:
    """Service of the rows that are computed for the first time; notes that they were counted."""
    sequence = item.sequence
    start = max(item.start, sequence.num_charged)
    if item.end <= start:
        return 0.0
    sequence.num_charged = item.end
    num_output = max(0, item.end - max(start, sequence.num_given))
    return PROMPT_TOKEN * (item.end - start - num_output) + OUTPUT_TOKEN * num_output
