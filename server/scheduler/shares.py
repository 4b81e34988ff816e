"""The tenants that have work, and the share of each: its weight over the weights of all of them."""

from collections import Counter

from ..generation import Share


class ActiveShares:
    """The tenants that have sequences, and the share of each."""

    def __init__(self) -> None:
        """Start with none."""
        self._sequences: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self._total = 0.0
        self._left: dict[str, tuple[float, int]] = {}
        """Weight of a tenant that has no work any more, and since when; the last at the end."""

    def __len__(self) -> int:
        """Tenants that have work."""
        return len(self._weights)

    def join(self, share: Share) -> None:
        """One more sequence of the tenant."""
        tenant = share.tenant
        self._sequences[tenant] += 1
        self._total += share.weight - self._weights.get(tenant, 0.0)
        self._weights[tenant] = share.weight
        self._left.pop(tenant, None)

    def leave(self, tenant: str, now: int = 0) -> None:
        """One less, at a time ``now``."""
        self._sequences[tenant] -= 1
        if self._sequences[tenant]:
            return
        weight = self._weights.pop(tenant)
        self._left[tenant] = weight, now
        self._total = self._total - weight if self._weights else 0.0  # no rounding is left

    def number(self, tenant: str) -> int:
        """Sequences of the tenant."""
        return self._sequences[tenant]

    def with_one_more(self, share: Share) -> float:
        """What the tenant's share is once it has another sequence."""
        others = self._total - self._weights.get(share.tenant, 0.0)
        return share.weight / (others + share.weight)

    def left_since(self, then: int) -> str | None:
        """The last tenant that ran out of work, unless that was before ``then``."""
        if not self._left:
            return None
        tenant = next(reversed(self._left))
        return tenant if self._left[tenant][1] >= then else None

    def of(self, tenant: str) -> float:
        """The tenant's share, 0 < share <= 1; where it has no work, what it would be with some."""
        if tenant in self._weights:
            return self._weights[tenant] / self._total
        weight, _ = self._left[tenant]
        return weight / (self._total + weight)
