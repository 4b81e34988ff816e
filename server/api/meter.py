"""What one request takes, brought to the ledger before the client gets it."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..usage.counts import NOTHING, Counts
from ..usage.ledger import Ledger
from .generate import Job, Tally


class Meter:
    """Counts one request; what it tallies is in the ledger before it is sent."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        """Start with nothing counted."""
        self.tally = Tally(job.prompts, job.choices_per_prompt)
        self._record = job.record
        self._ledger = ledger

    def sending(self) -> None:
        """Count what was tallied since the last time as sent; it may be, once this returns."""
        new = self._new()
        if new != NOTHING:
            self._ledger.add(self._record.consumer, new)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what was tallied and not sent when the block is left as undelivered."""
        try:
            yield
        finally:
            new = self._new()
            if new != NOTHING:
                lost = Counts(
                    undelivered_requests=new.requests,
                    undelivered_prompt_tokens=new.prompt_tokens,
                    undelivered_completion_tokens=new.completion_tokens,
                )
                self._ledger.add(self._record.consumer, lost)

    def _new(self) -> Counts:
        before, now = self._record.counts, self.tally.counts()
        self._record.counts = now
        return now - before
