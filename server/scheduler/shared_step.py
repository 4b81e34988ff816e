"""How long a step of several tenants may be, and whose its rows are.

Each tenant is to go on at least as fast as alone on a machine that is its share of this one. With
n0 the rows that a step's fixed cost is worth (reading the weights), a step of r rows takes time in
proportion to n0 + r. So for a tenant that alone would run r rows, a step of N rows may take

    n0 + N <= (n0 + r) / share

and the least N of all tenants is the step's budget. It is given out in rounds: first to decode rows
and to the prompts of the tenant whose turn it is, up to each tenant's share; then to these beyond
it; then to the prompts of the others, as long as the fixed cost outweighs the rows. So a prompt
that comes when its tenant has had less than others waits for none of theirs.

A tenant alone has steps of any length. One that others were beside a short time ago keeps its steps
short enough for the first token of a short prompt, because no step is interrupted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .counters import ServiceCounters
from .limits import SchedulerLimits
from .running import RunningSequences
from .shares import ActiveShares
from .step import Step
from .waiting import WaitingQueue

SHORT_PROMPT = 64
"""Tokens of a prompt that a tenant is assumed to come with next."""

RECENT = 1000
"""Steps for which a tenant that has no more work is expected back."""


@dataclass(frozen=True, slots=True)
class StepSharing:
    """Makes steps from the books of the scheduler, which it only reads."""

    limits: SchedulerLimits
    running: RunningSequences
    waiting: WaitingQueue
    shares: ActiveShares
    counters: ServiceCounters

    def rounds(self, number: int) -> Iterator[Step]:
        """Step number ``number``, once for each round in which it is to be filled."""
        if len(self.shares) < 2:
            yield Step(self._rows_alone(number))
            return
        rows = shared_rows(self._demands(), self.shares.of, self.limits)
        budget = min(rows + self._beam_rows(), self.limits.max_num_batched_tokens)
        step = Step(budget, lambda tenant: max(1, int(self.shares.of(tenant) * rows)))
        step.favoured = self._favoured()
        yield step
        step.quota = None
        yield step
        if step.prompt_rows(step.favoured):
            step.budget = min(step.budget, self.limits.step_overhead - step.num_rows)
        step.favoured = None
        yield step

    def _rows_alone(self, number: int) -> int:
        expected = self.shares.left_since(number - RECENT)
        demands = {} if expected is None else {expected: SHORT_PROMPT}
        return shared_rows(demands, self.shares.of, self.limits)

    def _beam_rows(self) -> int:
        """Rows of beams that go on: they all do, and take nothing of what others may have."""
        groups = (each.group for each in self.running.values())
        return sum(group is not None and group.is_ready for group in groups)

    def _demands(self) -> dict[str, int]:
        """Rows that each tenant would have in a step, were it alone.

        Of those who wait, the first of each tenant near the front of the line counts.
        """
        demands: Counter[str] = Counter()
        for sequence in (*self.running.values(), *self.waiting.first_of_each()):
            demands[sequence.tenant] += sequence.num_uncomputed_tokens
        most = self.limits.max_num_batched_tokens
        return {tenant: min(rows, most) for tenant, rows in demands.items()}

    def _favoured(self) -> str | None:
        """The tenant with a prompt to compute that has had the least service."""
        prompted = {e.tenant for e in self.running.values() if e.num_uncomputed_tokens > 1}
        first = self.counters.first()
        tenants = prompted if first is None else {first, *prompted}
        return min(tenants, key=self.counters.standing, default=None)


def shared_rows(
    demands: Mapping[str, int], share_of: Callable[[str], float], limits: SchedulerLimits
) -> int:
    """Rows of a step at most, where each tenant would run ``demands`` alone."""
    overhead = limits.step_overhead
    bounds = (
        max(rows, int((overhead + rows) / share_of(tenant)) - overhead)
        for tenant, rows in demands.items()
    )
    return min([limits.max_num_batched_tokens, *bounds])
