"""A step while it is put together."""

from dataclasses import dataclass, field

from .plan import PrefixLoad, ScheduledSequence, StepPlan
from .sequence import Sequence


@dataclass(slots=True)
class Step:
    """The step being put together; ``budget`` is the rows it still has room for."""

    budget: int
    scheduled: dict[Sequence, ScheduledSequence] = field(default_factory=dict)
    prefix_loads: list[PrefixLoad] = field(default_factory=list)
    unservable: list[Sequence] = field(default_factory=list)
    preempted: bool = False

    def put(self, sequence: Sequence) -> ScheduledSequence | None:
        """Compute as much of the sequence as there is room for.

        A beam's last token waits until those of the others are all that they lack.
        """
        start = sequence.num_computed_tokens
        total = len(sequence.token_ids)
        may = total if sequence.group is None or sequence.group.is_ready else total - 1
        end = min(may, start + self.budget)
        if end == start:
            return None
        self.budget -= end - start
        item = ScheduledSequence(sequence, start, end, samples=end == total)
        self.scheduled[sequence] = item
        return item

    def plan(self) -> StepPlan:
        """The step."""
        copies = (sequence.block_copy for sequence in self.scheduled)
        return StepPlan(
            tuple(self.scheduled.values()),
            tuple(self.prefix_loads),
            tuple(copy for copy in copies if copy is not None),
            tuple(self.unservable),
        )

    def drop(self, sequence: Sequence) -> None:
        """Give the room of a preempted sequence to the others."""
        self.preempted = True
        item = self.scheduled.pop(sequence, None)
        if item is not None:
            self.budget += item.num_tokens
