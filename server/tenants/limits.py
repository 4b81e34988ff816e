"""How much a tenant may ask for: counted in this process, and refused before anything is queued.

What is refused counts for nothing. Requests of a minute are an exact moving window. Tokens of a
minute are a sliding window of two counters, whose size does not grow with the limit.

Tokens are counted as OpenAI does: when a request begins, for its prompt and for the completion
tokens that it says it may take, whether it then takes them or not. Where it does not say, those it
took are counted when it ends.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from time import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import (
    MovingWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

from .errors import LimitExceeded
from .tenant import Tenant

REQUESTS, TOKENS = "requests", "tokens"
_SHORT = {REQUESTS: "RPM", TOKENS: "TPM"}
_BUSY_SECONDS = 1.0
"""After which to try again at the earliest, and where that depends on when others end."""

_NOBODY = Tenant("")


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a limit by the minute.

    Attributes:
        what: ``requests`` or ``tokens``.
        limit: In a minute.
        remaining: Now.
        reset: Seconds until there is more of it; 0 where nothing is used.
    """

    what: str
    limit: int
    remaining: int
    reset: float


class RunningRequest:
    """A request that was let in.

    Attributes:
        tokens: Completion tokens that it has brought.
    """

    def __init__(self, waiting: Counter[str], tenant: str) -> None:
        """It waits for its first token."""
        self.tokens = 0
        self._waiting: Counter[str] | None = waiting
        self._tenant = tenant
        waiting[tenant] += 1

    def took(self, tokens: int) -> None:
        """So many more completion tokens came; it waits no longer."""
        self.tokens += tokens
        self.ends_waiting()

    def ends_waiting(self) -> None:
        """It is not one that waits any more."""
        if self._waiting is not None:
            self._waiting[self._tenant] -= 1
            self._waiting = None


class TenantLimiter:
    """Counts what tenants ask for; belongs to the event loop's thread.

    A caller without a tenant, None, has no limits.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        storage = MemoryStorage()
        self._limiters: dict[str, RateLimiter] = {
            REQUESTS: MovingWindowRateLimiter(storage),
            TOKENS: SlidingWindowCounterRateLimiter(storage),
        }
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    def check(self, tenant: Tenant | None, tokens: int = 0) -> None:
        """Whether the tenant may begin a request of so many tokens now; counts nothing.

        Raises:
            LimitExceeded: It may not.
        """
        tenant = tenant or _NOBODY
        self._check_number(tenant, "in flight", self._running, "concurrency")
        self._check_number(tenant, "waiting", self._waiting, "queue")
        self._check_rate(tenant, REQUESTS, 1)
        self._check_rate(tenant, TOKENS, tokens)

    @contextmanager
    def admitted(
        self, tenant: Tenant | None, prompt: int, completion: int
    ) -> Iterator[RunningRequest]:
        """Let a request in, and count it as in flight until the block is left.

        Args:
            tenant: Whose.
            prompt: Tokens of its prompts.
            completion: Completion tokens that it says it may take; 0 where it does not say.

        Raises:
            LimitExceeded: It is not let in.
        """
        tenant = tenant or _NOBODY
        self.check(tenant, prompt + completion)
        self._count(tenant, REQUESTS, 1)
        self._count(tenant, TOKENS, prompt + completion)
        self._running[tenant.name] += 1
        request = RunningRequest(self._waiting, tenant.name)
        try:
            yield request
        finally:
            request.ends_waiting()
            self._running[tenant.name] -= 1
            self._count(tenant, TOKENS, request.tokens - completion)

    def allowances(self, tenant: Tenant | None) -> list[Allowance]:
        """What is left of the tenant's limits by the minute."""
        found = (self._allowance(tenant or _NOBODY, what) for what in (REQUESTS, TOKENS))
        return [each for each in found if each is not None]

    def _check_number(self, tenant: Tenant, what: str, counted: Counter[str], limit: str) -> None:
        number, most = counted[tenant.name], getattr(tenant.limits, limit)
        if most is not None and number >= most:
            raise LimitExceeded(
                f"{tenant.name} has {number} requests {what}, as many as its limit {limit!r} "
                "allows. Please try again when one of them has ended.",
                _BUSY_SECONDS,
                self.allowances(tenant),
            )

    def _check_rate(self, tenant: Tenant, what: str, cost: int) -> None:
        allowance = self._allowance(tenant, what)
        if allowance is None or cost <= allowance.remaining:
            return
        limit, used = allowance.limit, allowance.limit - allowance.remaining
        never = cost > limit
        seconds = max(allowance.reset, _BUSY_SECONDS)
        raise LimitExceeded(
            f"Rate limit reached for {tenant.name} on {what} per min ({_SHORT[what]}): Limit "
            f"{limit}, Used {used}, Requested {cost}. "
            + (
                "Shorten the prompt, or ask for fewer tokens."
                if never
                else f"Please try again in {ceil(seconds)}s."
            ),
            None if never else seconds,
            self.allowances(tenant),
        )

    def _count(self, tenant: Tenant, what: str, number: int) -> None:
        """Count as many as the window has room for: what was used beyond is used."""
        item, allowance = _item(tenant, what), self._allowance(tenant, what)
        if item is not None and allowance is not None:
            cost = min(number, allowance.remaining)
            if cost > 0:
                self._limiters[what].hit(item, tenant.name, what, cost=cost)

    def _allowance(self, tenant: Tenant, what: str) -> Allowance | None:
        item = _item(tenant, what)
        if item is None:
            return None
        reset, remaining = self._limiters[what].get_window_stats(item, tenant.name, what)
        used = remaining < item.amount
        return Allowance(what, item.amount, remaining, max(0.0, reset - time()) if used else 0.0)


def _item(tenant: Tenant, what: str) -> RateLimitItemPerMinute | None:
    limits = tenant.limits
    number = limits.requests_per_minute if what == REQUESTS else limits.tokens_per_minute
    return None if number is None else RateLimitItemPerMinute(number)
