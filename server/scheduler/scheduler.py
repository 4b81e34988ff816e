"""Continuous batching: chooses the tokens of every step and takes the results in.

A sequence is a list of tokens of which the first ``num_computed_tokens`` are in the KV cache; a
step moves that mark. Decoding, chunked prefill, a cached prefix and recomputation after preemption
are all the same case: some tokens are not computed yet.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from functools import partial

from ..generation import SequenceUpdate
from .acceptance import check_can_run
from .adapter_slots import AdapterSlots
from .admission import Admission
from .beam_group import BeamGroup, Continuation, beams_of, rows_of
from .block_manager import BlockManager
from .counters import ServiceCounters, service_of
from .errors import AccountingError, SequenceRefused
from .integrity import check_books
from .limits import SchedulerLimits, longest_sequence
from .outcome import failed, found, outcome
from .plan import ScheduledSequence, SequenceResult, StepPlan
from .residency_policy import admission_order, needed_adapters
from .room import Lack, RoomSharing
from .running import RunningSequences
from .sequence import Sequence
from .shared_step import StepSharing
from .shares import ActiveShares
from .step import Step
from .turns import Turns
from .waiting import WaitingQueue

_NO_SLOT = (
    "its adapters get no room on the device even while no other is in use: serve with a larger"
    " --memory-budget"
)


class Scheduler:
    """Decides which sequences run, and ends each of them exactly once.

    Attributes:
        limits: Its bounds.
        num_preemptions: Times a running sequence was taken off the device to be recomputed.
    """

    def __init__(
        self, limits: SchedulerLimits, blocks: BlockManager, adapters: AdapterSlots
    ) -> None:
        """Start with no sequence."""
        self.limits = limits
        self.num_preemptions = 0
        self._blocks = blocks
        self._adapters = adapters
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._running = RunningSequences()
        self._groups: dict[str, BeamGroup] = {}
        self._counters = ServiceCounters()
        self._shares = ActiveShares()
        self._waiting = WaitingQueue(self._counters)
        self._room = RoomSharing(limits, blocks, self._running, self._shares, self._counters)
        books = self._running, self._waiting, self._shares, self._counters
        self._sharing = StepSharing(limits, *books)
        self._num_steps = 0
        self._refused: set[tuple[int, ...]] = set()
        """What got no room; nothing can have changed until some sequence ends or is preempted."""

    def max_tokens_that_fit(self, sequence: Sequence) -> int:
        """Tokens of the sequence at most: what model and cache can hold beside its prefix."""
        prefix, blocks = sequence.adapters.prefix, self._blocks
        return longest_sequence(
            self.limits.max_model_len,
            blocks.most_blocks - self._adapters.blocks_of(*sequence.adapters.adapter_ids),
            blocks.block_size,
            0 if prefix is None else prefix.length,
            sequence.position_offset,
            1 if sequence.sampling.beams is None else sequence.sampling.beams.width,
        )

    @property
    def num_running(self) -> int:
        """Sequences that hold cache blocks, each beam of a search one of them."""
        return len(self._running)

    @property
    def num_running_requests(self) -> int:
        """Requests of these sequences."""
        return len({request_id for request_id, _ in self._running})

    @property
    def num_waiting(self) -> int:
        """Sequences to be admitted, preempted ones included."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue the sequence.

        Raises:
            SequenceTooLong: Its tokens leave no room for another.
            SequenceRefused: It has no prompt, nothing left to generate, the id of a live one, or
                tokens that the model does not have.
        """
        request_id = sequence.request.request_id
        if self._of(request_id):
            raise SequenceRefused(f"a request with the id {request_id} is running already")
        sequence.max_len = self.max_tokens_that_fit(sequence)
        check_can_run(sequence, self.limits, sequence.max_len)
        if sequence.sampling.beams is not None:
            sequence.group = BeamGroup(sequence.sampling.beams, sequence)
            self._groups[request_id] = sequence.group
        self._live(sequence)
        self._waiting.add(sequence)

    def abort(self, request_id: str) -> bool:
        """End the sequence now, without an update; False if it has ended already."""
        for sequence in self._of(request_id)[:1]:
            self._end_request(sequence)
            return True
        return False

    def has_begun(self, request_id: str) -> bool:
        """Whether the request runs, or has run."""
        return any(
            each.num_preemptions or each.name in self._running for each in self._of(request_id)
        )

    def schedule(self) -> StepPlan:
        """The next step: decode rows first, then running prefills, then newly admitted ones.

        Among several tenants this is done in rounds; ``StepSharing`` says what each is for.
        """
        self._num_steps += 1
        self._adapters.expect(needed_adapters(self._waiting))
        for step in self._sharing.rounds(self._num_steps):
            if step.budget > 0:
                self._fill(step)
        for item in step.scheduled.values():
            item.sequence.last_step = self._num_steps
            self._counters.charge(item.sequence.request.share, service_of(item))
        self._adapters.prefetch()
        return step.plan()

    def commit(self, plan: StepPlan, results: Iterable[SequenceResult]) -> list[SequenceUpdate]:
        """Take in the results of ``plan``, one per scheduled sequence, and end what is complete.

        Sequences that were aborted since ``schedule`` are passed over.
        """
        updates: list[SequenceUpdate | None]
        updates = [failed(sequence, _NO_SLOT) for sequence in plan.unservable]
        beams: dict[BeamGroup, dict[Sequence, SequenceResult]] = {}
        for item, result in zip(plan.scheduled, results, strict=True):
            if not self._running.has(item.sequence):
                continue
            if item.sequence.group is None:
                updates.append(self._commit(item, result))
            else:
                self._computed(item, result)
                beams.setdefault(item.sequence.group, {})[item.sequence] = result
        updates += [self._commit_beams(group, results) for group, results in beams.items()]
        return [update for update in updates if update is not None]

    def check_integrity(self) -> None:
        """Balance the books.

        Raises:
            AccountingError: A sequence is in two places or none, or runs without its blocks.
            KVAccountingError: The block manager's books do not balance.
        """
        live = self._sequences.values()
        check_books(live, self._running, self._waiting, self.limits, self._blocks)

    def _fill(self, step: Step) -> None:
        self._schedule_running(step)
        # What a preemption freed belongs to those it was freed for.
        if self._waiting and not step.preempted:
            self._admit(step)

    def _schedule_running(self, step: Step) -> None:
        # Every decode row fits, because the budget is at least max_num_seqs; among tenants, those
        # beyond a share take turns. Prefills take all they can, in order of admission.
        running = list(self._running.values())
        decodes = [sequence for sequence in running if sequence.num_uncomputed_tokens == 1]
        prefills = [sequence for sequence in running if sequence.num_uncomputed_tokens > 1]
        if len(self._shares) > 1:
            decodes.sort(key=lambda each: (each.group is None, each.last_step))
            prefills.sort(key=lambda each: self._counters.counter(each.tenant))
        for sequence in (*decodes, *prefills):
            runs = step.room(sequence) > 0 and self._running.has(sequence)
            if runs and self._cover(sequence, step):
                step.put(sequence)

    def _cover(self, sequence: Sequence, step: Step) -> bool:
        """Get blocks for all its tokens, if need be by preemption; False if that hit itself.

        Once a sequence was admitted, which may share what another one computes in this step,
        nothing is preempted any more: it waits for the next step.
        """
        while not self._blocks.extend(sequence, len(sequence.token_ids)):
            if step.started:
                return False
            step.preempted = True
            self._drop(self._room.last_by_blocks(), step)
            if sequence.name not in self._running:
                return False
        return True

    def _drop(self, sequence: Sequence, step: Step | None = None) -> None:
        """Take it off the device and out of the step, with all beams if it is one of a search."""
        for each in beams_of(sequence):
            if each.name in self._running:
                self._preempt(each)
                if step is not None:
                    step.drop(each)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.block_copy = None
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(sequence)

    def _admit(self, step: Step) -> None:
        step.coming = self._coming(step)
        Admission(
            step,
            Turns(
                self._waiting, self._counters, self.limits.max_num_batched_tokens, self._admission
            ),
            self._room,
            self._running,
            self.limits.max_overtakes,
            try_to_start=partial(self._try_to_start, step),
            preempt=partial(self._preempt_for_others, step),
            give_up=partial(self._give_up, step),
        ).run()

    def _admission(self, waiting: Seq[Sequence]) -> Iterable[int]:
        return admission_order(waiting, self._adapters.fits, self.limits.max_overtakes)

    def _preempt_for_others(self, step: Step, sequence: Sequence) -> None:
        self._drop(sequence, step)
        step.coming = self._coming(step)

    def _give_up(self, step: Step, sequence: Sequence) -> None:
        self._end_request(sequence)
        step.unservable.append(sequence)

    def _try_to_start(self, step: Step, sequence: Sequence) -> Lack | None:
        """Start the sequence, or say what it lacks."""
        adapter_ids = sequence.adapters.adapter_ids
        seats = self.limits.max_num_seqs - self._running.num_rows
        if not seats:
            return Lack.SEATS
        if adapter_ids in self._refused:
            return Lack.ADAPTERS
        cached = self._blocks.find_cached(sequence, sequence.cache_limit, step.coming)
        if lack := self._lack(sequence, cached, seats):
            return lack
        version, lost = self._blocks.version, self._adapters.blocks_for(*adapter_ids)
        if self._lack(sequence, cached, seats, lost) or not self._adapters.acquire(*adapter_ids):
            self._refused.add(adapter_ids)
            return Lack.ADAPTERS
        if self._blocks.version != version:  # adapters came where blocks were
            step.coming.update(self._coming(step))
            cached = self._blocks.find_cached(sequence, sequence.cache_limit, step.coming)
        self._start(sequence, cached, step)
        if (item := step.put(sequence)) is not None:
            step.coming |= self._blocks.filled(sequence, item.start, item.end)
        return None

    def _lack(
        self, sequence: Sequence, cached: list[int], seats: int, lost: int = 0
    ) -> Lack | None:
        """What it lacks beside adapters, where these take ``lost`` of the cache's blocks."""
        if rows_of(sequence) > seats:
            return Lack.SEATS
        # One spare block for every other that runs, or its next tokens would preempt this one.
        spare = len(self._running) - sum(each.name in self._running for each in beams_of(sequence))
        fits = self._blocks.can_allocate(sequence, cached, len(sequence.token_ids), spare + lost)
        return None if fits else Lack.BLOCKS

    def _coming(self, step: Step) -> dict[bytes, int]:
        """Blocks that the step fills, by name, if anyone waits to share them."""
        coming: dict[bytes, int] = {}
        if self._waiting:
            for item in step.scheduled.values():
                coming |= self._blocks.filled(item.sequence, item.start, item.end)
        return coming

    def _start(self, sequence: Sequence, cached: list[int], step: Step) -> None:
        self._waiting.remove(sequence)
        self._room.settle(sequence)
        step.started.add(sequence)
        load = self._blocks.allocate(sequence, cached, len(sequence.token_ids))
        if load is not None:
            step.prefix_loads[sequence] = load
        sequence.num_computed_tokens = len(cached) * self._blocks.block_size
        sequence.num_overtaken = 0
        self._running.add(sequence)
        if not sequence.num_preemptions:
            found = sequence.num_computed_tokens
            sequence.num_cached_tokens = min(found, sequence.prompt_len)
            if sequence.cache_limit:
                self._blocks.record_lookup(len(sequence.token_ids), found)

    def _commit(self, item: ScheduledSequence, result: SequenceResult) -> SequenceUpdate | None:
        sequence = item.sequence
        update = outcome(item, result)
        self._computed(item, result)
        if update is not None and update.finish_reason is not None:
            self._end_request(sequence)
        return update

    def _computed(self, item: ScheduledSequence, result: SequenceResult) -> None:
        """The rows of a sequence are in the cache, unless something was wrong with them."""
        sequence = item.sequence
        sequence.block_copy = None
        if result.error is None:
            sequence.num_computed_tokens = item.end
            self._blocks.publish(sequence, item.start, item.end)
        else:
            self._blocks.forget(sequence)

    def _commit_beams(
        self, group: BeamGroup, results: Mapping[Sequence, SequenceResult]
    ) -> SequenceUpdate | None:
        """What a step means for a search; None as long as it goes on."""
        first = group.beams[0]
        errors = [each.error for each in results.values() if each.error is not None]
        reported = [results[beam].logprobs for beam in group.beams if beam in results]
        rows = [row for row in reported if row is not None]
        if not errors and not rows:
            return None
        if not errors:
            most = first.max_len - first.prompt_len
            if chosen := group.choose(rows, min(first.sampling.max_tokens, most)):
                self._fork(group, chosen)
                return None
        self._end_request(first)
        return failed(first, errors[0]) if errors else found(first, group.answers())

    def _fork(self, group: BeamGroup, chosen: Seq[Continuation]) -> None:
        """Replace the beams by those that were chosen, of which several may have one parent."""
        parents, kept = group.beams, {each.parent for each in chosen}
        for number, parent in enumerate(parents):
            if number not in kept:
                self._end(parent)
        group.beams = [parents[number] for number in sorted(kept)]
        while self._blocks.num_free < len(chosen) and group.beams[0].name in self._running:
            self._drop(self._room.last_by_blocks())
        beams: list[Sequence] = []
        for each in chosen:
            parent = parents[each.parent]
            beams.append(self._child(group, parent) if parent in beams else parent)
        group.beams = beams
        for beam, each in zip(beams, chosen, strict=True):
            beam.token_ids.append(each.token.token_id)
            if beam.name in self._running:
                self._running.recount(beam)

    def _child(self, group: BeamGroup, parent: Sequence) -> Sequence:
        """Another sequence like the parent; if that waits, it waits too."""
        child = group.child(parent)
        child.num_charged, child.last_step = parent.num_charged, parent.last_step
        self._live(child)
        if parent.name not in self._running:
            self._waiting.add(child)
            return child
        self._blocks.fork(parent, child)
        child.num_computed_tokens = parent.num_computed_tokens
        if not self._adapters.acquire(*child.adapters.adapter_ids):
            raise AccountingError(f"the adapters of {parent.request.request_id} are not there")
        self._running.add(child)
        return child

    def _live(self, sequence: Sequence) -> None:
        self._sequences[sequence.name] = sequence
        self._shares.join(sequence.request.share)

    def _of(self, request_id: str) -> Seq[Sequence]:
        """The live sequences of a request."""
        if request_id in self._groups:
            return self._groups[request_id].beams
        sequence = self._sequences.get((request_id, 0))
        return [] if sequence is None else [sequence]

    def _end_request(self, sequence: Sequence) -> None:
        """End the sequence, and all other beams where it is one of a search."""
        for beam in beams_of(sequence):
            self._end(beam)
        self._groups.pop(sequence.request.request_id, None)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.name]
        self._shares.leave(sequence.tenant, self._num_steps)
        if sequence.name in self._running:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
            self._room.settle(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take it off the device."""
        self._running.remove(sequence)
        self._blocks.free(sequence)
        for adapter_id in sequence.adapters.adapter_ids:
            self._adapters.release(adapter_id)
        self._refused.clear()
