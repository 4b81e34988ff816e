"""Continuous batching: chooses the tokens of every step and takes the results in.

A sequence is a list of tokens of which the first ``num_computed_tokens`` are in the KV cache; a
step moves that mark. Decoding, chunked prefill, a cached prefix and recomputation after preemption
are all the same case: some tokens are not computed yet.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from operator import attrgetter

from ..generation import SequenceUpdate
from .adapter_slots import AdapterSlots
from .beam_group import BeamGroup, Continuation, beams_of, rows_of
from .block_manager import BlockManager
from .errors import AccountingError, SequenceRefused, SequenceTooLong
from .limits import SchedulerLimits, longest_sequence
from .outcome import failed, found, outcome
from .plan import ScheduledSequence, SequenceResult, StepPlan
from .sequence import Sequence
from .step import Step
from .waiting import WaitingQueue

_order = attrgetter("order")

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
        self._running: dict[tuple[str, int], Sequence] = {}
        self._groups: dict[str, BeamGroup] = {}
        self._waiting = WaitingQueue()
        self._refused: set[tuple[int, ...]] = set()
        """What got no room; nothing can have changed until some sequence releases an adapter."""

    def max_tokens_that_fit(self, sequence: Sequence) -> int:
        """Tokens of the sequence at most: what model and cache can hold beside its prefix."""
        prefix, blocks = sequence.adapters.prefix, self._blocks
        return longest_sequence(
            self.limits.max_model_len,
            blocks.num_blocks,
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
        self._check_can_run(sequence)
        if sequence.sampling.beams is not None:
            sequence.group = BeamGroup(sequence.sampling.beams, sequence)
            self._groups[sequence.request.request_id] = sequence.group
        self._sequences[sequence.name] = sequence
        self._waiting.add(sequence)

    def abort(self, request_id: str) -> bool:
        """End the sequence now, without an update; False if it has ended already."""
        group = self._groups.get(request_id)
        sequence = self._sequences.get((request_id, 0)) if group is None else group.beams[0]
        if sequence is not None:
            self._end_request(sequence)
        return sequence is not None

    def schedule(self) -> StepPlan:
        """The next step: decode rows first, then running prefills, then newly admitted ones."""
        step = Step(self.limits.max_num_batched_tokens)
        self._schedule_running(step)
        # What a preemption freed belongs to those it was freed for.
        if not step.preempted:
            self._admit(step)
        return step.plan()

    def commit(self, plan: StepPlan, results: Iterable[SequenceResult]) -> list[SequenceUpdate]:
        """Take in the results of ``plan``, one per scheduled sequence, and end what is complete.

        Sequences that were aborted since ``schedule`` are passed over.
        """
        updates: list[SequenceUpdate | None]
        updates = [failed(sequence, _NO_SLOT) for sequence in plan.unservable]
        beams: dict[BeamGroup, dict[Sequence, SequenceResult]] = {}
        for item, result in zip(plan.scheduled, results, strict=True):
            if self._running.get(item.sequence.name) is not item.sequence:
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
        self._blocks.check_integrity()
        waiting = [self._waiting[position] for position in range(len(self._waiting))]
        located = [*self._running.values(), *waiting]
        if len(located) != len(self._sequences) or set(located) != set(self._sequences.values()):
            raise AccountingError("a live sequence does not either run or wait")
        if waiting != sorted(waiting, key=_order):
            raise AccountingError("the waiting queue is out of order")
        if any(sequence.block_table or sequence.num_computed_tokens for sequence in waiting):
            raise AccountingError("a waiting sequence holds blocks")
        if len(self._running) > self.limits.max_num_seqs:
            raise AccountingError("more sequences run than max_num_seqs")
        for sequence in self._running.values():
            covered = len(sequence.block_table) * self._blocks.block_size
            if not sequence.num_computed_tokens < len(sequence.token_ids) <= covered + 1:
                raise AccountingError(f"{sequence.request.request_id} runs without its blocks")

    def _check_can_run(self, sequence: Sequence) -> None:
        request, beams = sequence.request, sequence.sampling.beams
        if beams is not None and beams.width > self.limits.max_num_seqs:
            raise SequenceRefused(
                f"{beams.width} beams are more than the {self.limits.max_num_seqs} sequences that"
                " run at once: ask for fewer (or serve with a larger --max-num-seqs)"
            )
        if sequence.name in self._sequences or request.request_id in self._groups:
            raise SequenceRefused(f"a request with the id {request.request_id} is running already")
        if not request.prompt_token_ids:
            raise SequenceRefused("the prompt is empty: send at least one token")
        if sequence.num_output_tokens >= request.sampling.max_tokens:
            raise SequenceRefused(
                f"nothing is left to generate: {sequence.num_output_tokens} tokens are there and"
                f" max_tokens is {request.sampling.max_tokens}"
            )
        longest = self.max_tokens_that_fit(sequence)
        if len(sequence.token_ids) >= longest:
            prefix = sequence.adapters.prefix
            beside = "" if prefix is None else f" beside the adapter's prefix of {prefix.length}"
            raise SequenceTooLong(
                f"the sequence has {len(sequence.token_ids)} tokens, but this server holds at most"
                f" {longest} tokens of prompt and output{beside}: shorten the prompt (or serve with"
                " a larger --max-model-len or --memory-budget)"
            )
        self._check_token_ids(sequence)

    def _check_token_ids(self, sequence: Sequence) -> None:
        """One id outside the tables of the model would end the step for everybody in it."""
        size, sampling = self.limits.vocab_size, sequence.sampling
        for what, ids in (
            ("prompt or output", sequence.token_ids),
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
            ("end_token_ids", sampling.end_token_ids),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < size:
                wrong = next(token_id for token_id in ids if not 0 <= token_id < size)
                raise SequenceRefused(
                    f"{what}: there is no token {wrong}, the model's ids are 0 to {size - 1}"
                )

    def _schedule_running(self, step: Step) -> None:
        # Every decode row fits, because the budget is at least max_num_seqs. A prefill that gets no
        # row is the next one's turn: prefills go in order of admission and each takes all it can.
        running = list(self._running.values())
        decodes = [sequence for sequence in running if sequence.num_uncomputed_tokens == 1]
        prefills = [sequence for sequence in running if sequence.num_uncomputed_tokens > 1]
        for sequence in (*decodes, *prefills):
            if not step.budget:
                break
            if sequence.name in self._running and self._cover(sequence, step):
                step.put(sequence)

    def _cover(self, sequence: Sequence, step: Step) -> bool:
        """Get blocks for all its tokens, if need be by preemption; False if that hit itself."""
        while not self._blocks.extend(sequence, len(sequence.token_ids)):
            for victim in self._preempt_last():
                step.drop(victim)
            if sequence.name not in self._running:
                return False
        return True

    def _preempt_last(self) -> list[Sequence]:
        """Take the last-come sequence off the device, with all beams if it is one of a search."""
        last = max(self._running.values(), key=_order)
        preempted = [each for each in beams_of(last) if each.name in self._running]
        for sequence in preempted:
            self._preempt(sequence)
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.block_copy = None
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(sequence)

    def _admit(self, step: Step) -> None:
        position = 0
        overtaken = 0
        coming = self._coming(step)
        while self._has_room(step) and position < len(self._waiting):
            sequence = self._waiting[position]
            adapter_ids = sequence.adapters.adapter_ids
            if adapter_ids not in self._refused:
                cached = self._blocks.find_cached(sequence, sequence.cache_limit, coming)
                if not self._fits(sequence, cached):
                    break
                if self._adapters.acquire(*adapter_ids):
                    self._start(self._waiting.pop(position), cached, step)
                    if (item := step.put(sequence)) is not None:
                        coming |= self._blocks.filled(sequence, item.start, item.end)
                    overtaken = position
                    continue
                self._refused.add(adapter_ids)
            if not self._running:
                self._end_request(sequence)
                step.unservable.append(sequence)
            elif sequence.num_overtaken >= self.limits.max_overtakes:
                break
            else:
                position += 1
        self._waiting.count_overtaken(overtaken)

    def _coming(self, step: Step) -> dict[bytes, int]:
        """Blocks that the step fills, by name, if anyone waits to share them."""
        coming: dict[bytes, int] = {}
        if self._waiting:
            for item in step.scheduled.values():
                coming |= self._blocks.filled(item.sequence, item.start, item.end)
        return coming

    def _has_room(self, step: Step) -> bool:
        return step.budget > 0 and len(self._running) < self.limits.max_num_seqs

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        taken = sum(rows_of(each) for each in self._running.values())
        if taken + rows_of(sequence) > self.limits.max_num_seqs:
            return False
        # One spare block for every other that runs, or its next tokens would preempt this one.
        others = [each for each in self._running.values() if each not in beams_of(sequence)]
        spare = len(others)
        return self._blocks.can_allocate(sequence, cached, len(sequence.token_ids), spare)

    def _start(self, sequence: Sequence, cached: list[int], step: Step) -> None:
        load = self._blocks.allocate(sequence, cached, len(sequence.token_ids))
        if load is not None:
            step.prefix_loads.append(load)
        sequence.num_computed_tokens = len(cached) * self._blocks.block_size
        sequence.num_overtaken = 0
        self._running[sequence.name] = sequence
        if not sequence.num_preemptions:
            found = sequence.num_computed_tokens
            sequence.num_cached_tokens = min(found, sequence.prompt_len)
            if sequence.cache_limit:
                self._blocks.record_lookup(len(sequence.token_ids), found)

    def _commit(self, item: ScheduledSequence, result: SequenceResult) -> SequenceUpdate | None:
        sequence = item.sequence
        update = outcome(item, result, self.max_tokens_that_fit(sequence))
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
            most = self.max_tokens_that_fit(first) - first.prompt_len
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
            self._preempt_last()
        beams: list[Sequence] = []
        for each in chosen:
            parent = parents[each.parent]
            beams.append(self._child(group, parent) if parent in beams else parent)
        group.beams = beams
        for beam, each in zip(beams, chosen, strict=True):
            beam.token_ids.append(each.token.token_id)

    def _child(self, group: BeamGroup, parent: Sequence) -> Sequence:
        """Another sequence like the parent; if that waits, it waits too."""
        child = group.child(parent)
        self._sequences[child.name] = child
        if parent.name not in self._running:
            self._waiting.add(child)
            return child
        self._blocks.fork(parent, child)
        child.num_computed_tokens = parent.num_computed_tokens
        if not self._adapters.acquire(*child.adapters.adapter_ids):
            raise AccountingError(f"the adapters of {parent.request.request_id} are not there")
        self._running[child.name] = child
        return child

    def _end_request(self, sequence: Sequence) -> None:
        """End the sequence, and all other beams where it is one of a search."""
        for beam in beams_of(sequence):
            self._end(beam)
        self._groups.pop(sequence.request.request_id, None)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.name]
        if sequence.name in self._running:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take it off the device."""
        del self._running[sequence.name]
        self._blocks.free(sequence)
        for adapter_id in sequence.adapters.adapter_ids:
            self._adapters.release(adapter_id)
            self._refused.clear()
