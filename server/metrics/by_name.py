"""Series by the name of a tenant or an adapter, of the most used names only.

A label for everybody would let whoever can register adapters fill Prometheus' memory. Here at most
``limit`` names have series of their own and the others share one, ``(other)``. A token is counted
in one series, the one its name has at that moment, so no series ever goes down: a name that gets
its own starts at zero, and what it used before stays where it was counted.
"""

from collections import Counter as Multiset
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Summary

MAX_NAMES = 50
"""Names with series of their own."""

OTHER = "(other)"
"""All others; no tenant and no adapter can be called so."""

_REMEMBERED = 10
"""Names whose use is remembered, for each that may have series of its own."""

_MARGIN = 2
"""How many times more than a name with series one without must have been used to take its place."""


@dataclass(frozen=True, slots=True)
class _Series:
    requests: Counter
    prompt_tokens: Counter
    generation_tokens: Counter
    first_token: Summary


class ByName:
    """Series of all names of one kind."""

    def __init__(self, kind: str, registry: CollectorRegistry, limit: int = MAX_NAMES) -> None:
        """Start without a name; ``kind`` is the label, and part of the series' names."""
        self._limit = limit
        self._requests = _counter(kind, "requests", "Sequences begun", registry)
        self._prompt = _counter(kind, "prompt_tokens", "Prompt tokens of sequences begun", registry)
        self._generation = _counter(kind, "generation_tokens", "Tokens generated", registry)
        self._first_token = Summary(
            f"deltamux:{kind}_time_to_first_token_seconds",
            f"Time to the first token, by {kind}.",
            (kind,),
            registry=registry,
        )
        self._shown: dict[str, _Series] = {}
        self._other = self._series(OTHER)
        self._used: Multiset[str] = Multiset()

    def begun(self, name: str, prompt_tokens: int, seconds: float) -> None:
        """A sequence got its first token after so long."""
        series = self._of(name)
        series.requests.inc()
        series.prompt_tokens.inc(prompt_tokens)
        series.first_token.observe(seconds)

    def generated(self, name: str, number: int) -> None:
        """So many tokens were generated."""
        self._used[name] += number
        self._of(name).generation_tokens.inc(number)

    def review(self) -> None:
        """Give series to names that are now used more than others that have some.

        Use is halved each time, so that it is mostly that of the last few reviews.
        """
        for name, used in self._used.most_common(2 * self._limit):
            if name in self._shown or len(self._shown) < self._limit:
                continue
            least = min(self._shown, key=self._used.__getitem__)
            if used <= _MARGIN * self._used[least]:
                break
            self._replace(least, name)
        kept = self._used.most_common(_REMEMBERED * self._limit)
        self._used = Multiset({name: used // 2 for name, used in kept if used > 1})

    def _of(self, name: str) -> _Series:
        found = self._shown.get(name)
        if found is None:
            if len(self._shown) >= self._limit:
                return self._other
            found = self._shown[name] = self._series(name)
        return found

    def _replace(self, old: str, new: str) -> None:
        del self._shown[old]
        for family in (self._requests, self._prompt, self._generation, self._first_token):
            family.remove(old)
        self._shown[new] = self._series(new)

    def _series(self, name: str) -> _Series:
        return _Series(
            self._requests.labels(name),
            self._prompt.labels(name),
            self._generation.labels(name),
            self._first_token.labels(name),
        )


def _counter(kind: str, name: str, text: str, registry: CollectorRegistry) -> Counter:
    return Counter(f"deltamux:{kind}_{name}", f"{text}, by {kind}.", (kind,), registry=registry)
