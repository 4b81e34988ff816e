"""Who makes room for whom, where running sequences leave none for one that is to be admitted.

A tenant that asks for no more than its share, and is not ahead in service, need not wait until
those that hold more than theirs come to an end: their last-come sequences are taken off the device,
to be recomputed later. A tenant keeps at least one request. While such a *claim* lacks room, those
that hold more than their share are given nothing of what becomes free.
"""

from dataclasses import dataclass
from enum import Enum, auto

from .beam_group import beams_of, rows_of
from .block_manager import BlockManager
from .counters import ServiceCounters
from .limits import SchedulerLimits
from .running import Holding, Measure, RunningSequences
from .sequence import Sequence
from .shares import ActiveShares
from .step import Step


class Lack(Enum):
    """What keeps a sequence from running."""

    SEATS = auto()
    BLOCKS = auto()
    ADAPTERS = auto()


@dataclass(frozen=True, slots=True)
class Claim:
    """A sequence that is entitled to room, and of what."""

    sequence: Sequence
    lack: Lack


@dataclass(slots=True)
class RoomSharing:
    """Decides it from the books of the scheduler, which it only reads."""

    limits: SchedulerLimits
    blocks: BlockManager
    running: RunningSequences
    shares: ActiveShares
    counters: ServiceCounters
    _claim: Claim | None = None

    def last_by_blocks(self) -> Sequence:
        """The running sequence to take off the device where blocks run out."""
        return self.running.last(self._measure(Lack.BLOCKS))

    def victim(self, sequence: Sequence, lack: Lack, step: Step) -> Sequence | None:
        """Which running sequence makes room for one that lacks it; None if none has to."""
        if len(self.shares) < 2:
            return None
        holdings = self.running.holdings(self._measure(lack))
        if sequence.tenant in holdings and self._exceeds(sequence, lack, holdings):
            return None
        givers = self._givers(sequence, lack, holdings)
        if not givers:
            return None
        self._claim = Claim(sequence, lack)
        giver = max(givers, key=lambda tenant: holdings[tenant].relative)
        return next(
            (each for each in self.running.of_tenant(giver) if self._may_go(each, step)), None
        )

    def is_claimed_from(self, sequence: Sequence) -> bool:
        """Whether the sequence must leave what is free to a claim."""
        claim = self._claim
        if claim is None or sequence.tenant == claim.sequence.tenant or not self.running:
            return False
        holdings = self.running.holdings(self._measure(claim.lack))
        return self._exceeds(sequence, claim.lack, holdings)

    def settle(self, sequence: Sequence) -> None:
        """The sequence runs or has ended: it claims nothing any more."""
        if self._claim is not None and self._claim.sequence is sequence:
            self._claim = None

    def _givers(self, sequence: Sequence, lack: Lack, holdings: dict[str, Holding]) -> list[str]:
        """Tenants that hold more than their share, and are not behind in service."""
        capacity = self._capacity(lack, holdings)
        return [
            tenant
            for tenant, held in holdings.items()
            if tenant != sequence.tenant
            and len(held.requests) > 1
            and held.used > self.shares.of(tenant) * capacity
            and self._is_behind(sequence, tenant)
        ]

    def _may_go(self, victim: Sequence, step: Step) -> bool:
        """Whether nothing of this step depends on what the sequence would compute in it."""
        if victim in step.started:
            return False
        items = [step.scheduled[each] for each in beams_of(victim) if each in step.scheduled]
        filled = [self.blocks.filled(each.sequence, each.start, each.end) for each in items]
        return not any(self.blocks.is_shared(block) for one in filled for block in one.values())

    def _exceeds(self, sequence: Sequence, lack: Lack, holdings: dict[str, Holding]) -> bool:
        """Whether its tenant would hold more than its share with it."""
        held = holdings.get(sequence.tenant)
        used = self._need(sequence, lack) + (0 if held is None else held.used)
        return used > self.shares.of(sequence.tenant) * self._capacity(lack, holdings)

    def _is_behind(self, sequence: Sequence, tenant: str) -> bool:
        """Whether its tenant has had no more service than the other, within a step's rows."""
        ahead = self.counters.counter(sequence.tenant) - self.counters.counter(tenant)
        return ahead * sequence.request.share.weight <= self.limits.max_num_batched_tokens

    def _measure(self, lack: Lack) -> Measure:
        match lack:
            case Lack.SEATS:
                return self.running.rows
            case Lack.BLOCKS:
                return lambda each: len(each.block_table) + len(each.prefix_blocks)
            case Lack.ADAPTERS:
                return lambda each: bool(each.adapters.adapter_ids)

    def _need(self, sequence: Sequence, lack: Lack) -> int:
        match lack:
            case Lack.SEATS:
                return rows_of(sequence)
            case Lack.BLOCKS:
                return self.blocks.num_needed(sequence, len(sequence.token_ids))
            case Lack.ADAPTERS:
                return 1

    def _capacity(self, lack: Lack, holdings: dict[str, Holding]) -> int:
        """What all hold at most; of adapters, which differ in size, what they hold now."""
        match lack:
            case Lack.SEATS:
                return self.limits.max_num_seqs
            case Lack.BLOCKS:
                return self.blocks.num_blocks
            case Lack.ADAPTERS:
                return sum(held.used for held in holdings.values())
