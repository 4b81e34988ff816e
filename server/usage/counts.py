"""What usage is counted by, and what is counted."""

import msgspec


class Consumer(msgspec.Struct, frozen=True, array_like=True):
    """Who used what.

    Attributes:
        base: Served name of the base.
        tenant: Name; empty for the operator.
        key_id: Of the key, never the key itself; empty for a server without tenants.
        adapter: Name; several of one request joined by ``+``; empty for the bare base.
        digest: Of the adapter's version, joined alike.
    """

    base: str
    tenant: str = ""
    key_id: str = ""
    adapter: str = ""
    digest: str = ""


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """Amounts that add up.

    Attributes:
        requests: Those whose answer, or the beginning of it, was sent.
        prompt_tokens: Theirs.
        cached_tokens: Of these, taken from the prefix cache.
        completion_tokens: Generated and sent.
        undelivered_requests: Those that failed, or whose client went away, before their whole
            answer was there, so that nothing was sent.
        undelivered_prompt_tokens: Theirs.
        undelivered_completion_tokens: Generated for them.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    undelivered_requests: int = 0
    undelivered_prompt_tokens: int = 0
    undelivered_completion_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Both together."""
        return Counts(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.undelivered_requests + other.undelivered_requests,
            self.undelivered_prompt_tokens + other.undelivered_prompt_tokens,
            self.undelivered_completion_tokens + other.undelivered_completion_tokens,
        )

    def __sub__(self, other: "Counts") -> "Counts":
        """What was counted since the other."""
        return Counts(
            self.requests - other.requests,
            self.prompt_tokens - other.prompt_tokens,
            self.cached_tokens - other.cached_tokens,
            self.completion_tokens - other.completion_tokens,
            self.undelivered_requests - other.undelivered_requests,
            self.undelivered_prompt_tokens - other.undelivered_prompt_tokens,
            self.undelivered_completion_tokens - other.undelivered_completion_tokens,
        )


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What one consumer used on one day.

    Attributes:
        day: Days since 1970-01-01 in UTC.
        consumer: Whose.
        counts: How much.
    """

    day: int
    consumer: Consumer
    counts: Counts


NOTHING = Counts()

Sums = dict[tuple[int, Consumer], Counts]
"""Counts by day and consumer."""


def add_entry(sums: Sums, entry: Entry) -> None:
    """Add the entry to its sum."""
    key = (entry.day, entry.consumer)
    sums[key] = sums.get(key, NOTHING) + entry.counts
