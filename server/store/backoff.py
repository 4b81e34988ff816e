"""When what failed may be tried again: waits that double, and the reason until then."""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from .errors import AdapterUnavailable

_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    times: int
    retry_at: float


class Backoff:
    """Failures by what failed; each is tried again at the first request after its wait."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Start without any."""
        self._clock = clock
        self._failures: dict[str, _Failure] = {}

    def reason(self, key: str) -> str | None:
        """Why it failed last, None where it did not."""
        failure = self._failures.get(key)
        return None if failure is None else failure.reason

    def check(self, key: str) -> None:
        """Pass what may be tried.

        Raises:
            AdapterUnavailable: It failed a short while ago.
        """
        failure = self._failures.get(key)
        if failure is not None and failure.retry_at > self._clock():
            raise self.unavailable(key)

    def failed(self, key: str, reason: str) -> None:
        """Note a failure."""
        times = self._failures[key].times + 1 if key in self._failures else 1
        wait = min(_FIRST_SECONDS * 2 ** (times - 1), _LONGEST_SECONDS)
        self._failures[key] = _Failure(reason, times, self._clock() + wait)

    def clear(self, key: str) -> None:
        """Forget failures: it succeeded, or it is gone."""
        self._failures.pop(key, None)

    def unavailable(self, key: str) -> AdapterUnavailable:
        """The error for those who ask for what failed."""
        failure = self._failures[key]
        return AdapterUnavailable(failure.reason, max(failure.retry_at - self._clock(), 1.0))
