"""A step while it is put together."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import starmap

from .plan import PrefixLoad, ScheduledSequence, StepPlan
from .sequence import Sequence


@dataclass(slots=True)
class Step:
    """The step being put together.

    Attributes:
        budget: Rows it still has room for.
        quota: Rows that a tenant may take; None where tenants take what they can.
        favoured: The tenant that prompts are computed for; None for all.
        started: Sequences that begin to run in it.
        coming: Blocks that it fills, by name, for those that are to be admitted.
        preempted: Whether a sequence was taken off the device for those that run.
    """

    budget: int
    quota: Callable[[str], int] | None = None
    favoured: str | None = None
    scheduled: dict[Sequence, ScheduledSequence] = field(default_factory=dict)
    started: set[Sequence] = field(default_factory=set)
    coming: dict[bytes, int] = field(default_factory=dict)
    prefix_loads: dict[Sequence, PrefixLoad] = field(default_factory=dict)
    unservable: list[Sequence] = field(default_factory=list)
    preempted: bool = False
    _taken: Counter[str] = field(default_factory=Counter)

    def room(self, sequence: Sequence) -> int:
        """Rows that the sequence may have; beams that go on do so together, whatever it takes."""
        if sequence.group is not None and sequence.group.is_ready:
            return max(1, self.budget)
        others = self.favoured is not None and sequence.tenant != self.favoured
        if others and sequence.num_uncomputed_tokens > 1:
            return 0
        if self.quota is None:
            return self.budget
        return min(self.budget, self.quota(sequence.tenant) - self._taken[sequence.tenant])

    def put(self, sequence: Sequence) -> ScheduledSequence | None:
        """Compute as much of the sequence, or as much more, as there is room for.

        A beam's last token waits until those of the others are all that they lack.
        """
        before = self.scheduled.get(sequence)
        start = sequence.num_computed_tokens if before is None else before.end
        total = len(sequence.token_ids)
        may = total if sequence.group is None or sequence.group.is_ready else total - 1
        end = min(may, start + self.room(sequence))
        if end <= start:
            return None
        self._take(sequence, end - start)
        first = start if before is None else before.start
        is_last, embeds = end == total, sequence.request.embeds
        item = ScheduledSequence(sequence, first, end, is_last and not embeds, is_last and embeds)
        self.scheduled[sequence] = item
        return item

    def prompt_rows(self, tenant: str | None) -> int:
        """Rows in it of the tenant's prompts."""
        own = (item for each, item in self.scheduled.items() if each.tenant == tenant)
        return sum(item.num_tokens for item in own if item.num_tokens > 1)

    @property
    def num_rows(self) -> int:
        """Rows that are in it."""
        return self._taken.total()

    def plan(self) -> StepPlan:
        """The step."""
        copies = (sequence.block_copy for sequence in self.scheduled)
        return StepPlan(
            tuple(self.scheduled.values()),
            tuple(starmap(_located, self.prefix_loads.items())),
            tuple(copy for copy in copies if copy is not None),
            tuple(self.unservable),
        )

    def drop(self, sequence: Sequence) -> None:
        """Give the room of a preempted sequence to the others."""
        item = self.scheduled.pop(sequence, None)
        if item is not None:
            self._take(sequence, -item.num_tokens)

    def _take(self, sequence: Sequence, rows: int) -> None:
        self.budget -= rows
        self._taken[sequence.tenant] += rows


def _located(sequence: Sequence, load: PrefixLoad) -> PrefixLoad:
    """Where the blocks to be written are now: since they were taken, they may have been moved."""
    return PrefixLoad(load.prefix, {index: sequence.prefix_blocks[index] for index in load.blocks})
