"""When requests must have begun to run."""

from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil
from time import monotonic

from ..generation import GenerationRequest


class Deadlines:
    """Of requests, the earliest first; those of requests that ended stay until they pass."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Start with none; ``clock`` is what deadlines are told by."""
        self._clock = clock
        self._heap: list[tuple[float, str]] = []

    def add(self, request: GenerationRequest) -> None:
        """Watch the request's deadline, if it has one."""
        if request.deadline is not None:
            heappush(self._heap, (request.deadline, request.request_id))

    def passed(self) -> list[str]:
        """Ids of the requests whose deadlines have passed since the last call."""
        now, passed = self._clock(), []
        while self._heap and self._heap[0][0] <= now:
            passed.append(heappop(self._heap)[1])
        return passed

    def milliseconds(self) -> int | None:
        """To the next deadline; None without any."""
        return max(0, ceil(1000 * (self._heap[0][0] - self._clock()))) if self._heap else None
