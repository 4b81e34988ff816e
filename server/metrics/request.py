"""What is known of one request for text while it runs, for metrics, usage, logs and traces."""

from dataclasses import dataclass, field
from time import monotonic, time

from ..usage.counts import NOTHING, Consumer, Counts


@dataclass(slots=True)
class SequenceTimes:
    """Moments of one sequence, as ``monotonic`` tells them; None for what did not happen yet.

    Attributes:
        begun: It was asked for.
        scheduled: It was part of a step for the first time.
        first_token: Its first token was there.
        last_token: Its last one so far was.
        finish_reason: Why it ended.
    """

    begun: float = field(default_factory=monotonic)
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asked for, as traces show it.

    Attributes:
        id: What the client is told the answer is called.
        operation: ``chat`` or ``text_completion``.
        stream: Whether the answer is streamed.
        n: Choices for each prompt.
        max_tokens: Of each choice, None for as many as fit.
        temperature: Of sampling.
        top_p: Of sampling.
    """

    id: str
    operation: str
    stream: bool
    n: int
    max_tokens: int | None
    temperature: float
    top_p: float


@dataclass(slots=True)
class RequestRecord:
    """One request; filled while it runs, read when it has ended.

    Attributes:
        consumer: What its usage is counted by; its adapters once they are leased.
        asked: What for.
        sequences: Those it began.
        counts: What was tallied so far.
        begun: When it came, as ``monotonic`` tells it.
        begun_at: The same in Unix time.
    """

    consumer: Consumer
    asked: Asked
    sequences: list[SequenceTimes] = field(default_factory=list)
    counts: Counts = NOTHING
    begun: float = field(default_factory=monotonic)
    begun_at: float = field(default_factory=time)

    @property
    def queue_seconds(self) -> float | None:
        """Until its first sequence was part of a step."""
        return self._since_begun([each.scheduled for each in self.sequences])

    @property
    def first_token_seconds(self) -> float | None:
        """Until its first token was there."""
        return self._since_begun([each.first_token for each in self.sequences])

    @property
    def prefill_seconds(self) -> float | None:
        """From its first step to its first token, of the sequence that took longest."""
        return _longest([(each.scheduled, each.first_token) for each in self.sequences])

    @property
    def decode_seconds(self) -> float | None:
        """From its first token to its last, of the sequence that took longest."""
        return _longest([(each.first_token, each.last_token) for each in self.sequences])

    @property
    def seconds(self) -> float:
        """Since it came."""
        return monotonic() - self.begun

    @property
    def finish_reasons(self) -> list[str]:
        """Of its sequences that ended, in order."""
        return [each.finish_reason for each in self.sequences if each.finish_reason is not None]

    def _since_begun(self, moments: list[float | None]) -> float | None:
        known = [each for each in moments if each is not None]
        return min(known) - self.begun if known else None


def _longest(spans: list[tuple[float | None, float | None]]) -> float | None:
    known = [end - start for start, end in spans if start is not None and end is not None]
    return max(known, default=None)
