"""One sequence while it runs: every token's moment becomes a sample of the series that want it."""

from time import monotonic
from typing import TYPE_CHECKING

from .request import RequestRecord, SequenceTimes

if TYPE_CHECKING:
    from .metrics import Metrics


class SequenceRecord:
    """Times one sequence; reports to its ``Metrics`` as things happen."""

    def __init__(self, metrics: "Metrics", request: RequestRecord, prompt_tokens: int) -> None:
        """Start the clock."""
        self._metrics = metrics
        self._tenant, self._adapter = metrics.names(request)
        self._prompt_tokens = prompt_tokens
        self._generated = 0
        self.times = SequenceTimes()
        request.sequences.append(self.times)

    def tokens(self, number: int, scheduled: float | None) -> None:
        """``number`` tokens arrived now; a last update may bring none.

        Args:
            number: Of tokens.
            scheduled: When the sequence was first part of a step, where that is told now.
        """
        if scheduled is not None:
            self._scheduled(scheduled)
        if not number:
            return
        now = monotonic()
        last = self.times.last_token
        if last is None:
            self._first_token(now)
        else:
            self._metrics.inter_token.observe(now - last)
        self.times.last_token = now
        self._generated += number
        self._metrics.generated(self._tenant, self._adapter, number)

    def embedded(self, scheduled: float | None) -> None:
        """Its vector arrived now, the one thing that it brings."""
        if scheduled is not None:
            self._scheduled(scheduled)
        self._first_token(monotonic())

    def finish(self, reason: str) -> None:
        """The sequence ended by itself, for one of OpenAI's reasons."""
        times, metrics = self.times, self._metrics
        times.finish_reason = reason
        metrics.success(reason)
        metrics.latency.observe(monotonic() - times.begun)
        metrics.request_prompt.observe(self._prompt_tokens)
        metrics.request_generation.observe(self._generated)
        if times.first_token is not None and times.last_token is not None:
            metrics.decode_time.observe(times.last_token - times.first_token)
            if times.scheduled is not None:
                metrics.prefill_time.observe(times.first_token - times.scheduled)

    def _scheduled(self, moment: float) -> None:
        self.times.scheduled = moment
        self._metrics.queue_time.observe(moment - self.times.begun)

    def _first_token(self, now: float) -> None:
        self.times.first_token = now
        waited = now - self.times.begun
        self._metrics.first_token.observe(waited)
        self._metrics.begun(self._tenant, self._adapter, self._prompt_tokens, waited)
