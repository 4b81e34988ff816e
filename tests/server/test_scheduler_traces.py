"""Random traffic against a runner with a simulated KV cache.

The simulated cache says of every slot which salts and which tokens its contents depend on. Before a
step every scheduled sequence must find exactly its own past in the slots of its block table, save
what the rows of another sequence write in this very step; and after all rows have written, as a
layer does before its attention reads, it must find that too. So a wrongly shared, lost, stale or
overwritten block is seen where it happens. The next token is a function of all that, so the final
text also shows whether every recomputation was right.
"""

import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from deltamux.server.generation import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Share,
    TokenLogprobs,
)
from deltamux.server.scheduler.block_manager import BlockManager
from deltamux.server.scheduler.errors import SequenceTooLong
from deltamux.server.scheduler.limits import SchedulerLimits
from deltamux.server.scheduler.plan import SequenceResult
from deltamux.server.scheduler.scheduler import Scheduler
from deltamux.server.scheduler.sequence import AdapterUse, Prefix, Salt, Sequence

VOCAB = 6
END, STOP = 4, 5
ADAPTER_SIZES = {1: 1, 2: 1, 3: 2, 4: 3}
PREFIX_LENGTHS = {2: 3, 3: 5}
POOL = 3


def contents(sequence, position):
    """What the keys and values at a position depend on."""
    cache_salt = sequence.request.cache_salt
    salts = [salt.value for salt in sequence.adapters.salts if salt.position <= position]
    return cache_salt, tuple(salts), tuple(sequence.token_ids[: position + 1])


def next_token(depends_on):
    return zlib.crc32(repr(depends_on).encode()) % VOCAB


class FakeSlots:
    """A pool of POOL units with adapters of different sizes; idle ones go, least recent first."""

    def __init__(self):
        self.held = Counter()
        self.resident = OrderedDict()

    def acquire(self, *adapter_ids):
        kept = {*+self.held, *adapter_ids}
        if sum(ADAPTER_SIZES[a] for a in kept) > POOL:
            return False
        idle = [a for a in self.resident if a not in kept]
        self.resident.update((a, ADAPTER_SIZES[a]) for a in adapter_ids)
        while sum(self.resident.values()) > POOL:
            del self.resident[idle.pop(0)]
        for adapter_id in adapter_ids:
            self.resident.move_to_end(adapter_id)
        self.held.update(adapter_ids)
        return True

    def fits(self, *adapter_ids):
        return sum(ADAPTER_SIZES[a] for a in {*self.resident, *adapter_ids}) <= POOL

    def blocks_for(self, *adapter_ids):
        return 0

    def blocks_of(self, *adapter_ids):
        return 0

    def expect(self, adapter_ids):
        self.expected = list(adapter_ids)

    def prefetch(self):
        for adapter_id in self.expected:
            if adapter_id not in self.resident and self.fits(adapter_id):
                self.resident[adapter_id] = ADAPTER_SIZES[adapter_id]
                return

    def release(self, adapter_id):
        assert self.held[adapter_id] > 0
        self.held[adapter_id] -= 1


@dataclass
class Arrival:
    """One request of a trace; ``step`` is when it comes, ``abort`` when its client leaves."""

    request: GenerationRequest
    adapters: AdapterUse
    step: int
    abort: int | None
    error_at: int | None
    updates: list = field(default_factory=list)

    def expected(self, max_len):
        """Tokens and end of the request alone on an endless machine."""
        request, sampling = self.request, self.request.sampling
        alone = Sequence(request, self.adapters, 0)
        while True:
            output = alone.token_ids[alone.prompt_len :]
            if self.error_at == len(output):
                return output, FinishReason.ERROR, None
            output.append(next_token(contents(alone, len(alone.token_ids) - 1)))
            alone.token_ids.append(output[-1])
            stops = {*sampling.end_token_ids, *sampling.stop_token_ids}
            if output[-1] in stops and len(output) > sampling.min_tokens:
                return output, FinishReason.STOP, output[-1]
            length = len(request.prompt_token_ids) + len(output)
            if len(output) == sampling.max_tokens or length == max_len:
                return output, FinishReason.LENGTH, None


class SimulatedRunner:
    """Keeps what every slot of the cache depends on and checks what each row would read."""

    def __init__(self, block_size, arrivals):
        self.block_size = block_size
        self.arrivals = arrivals
        self.slots = {}
        self.shared_in_step = False
        self.prefixes_shared = False

    def load(self, load):
        prefix = load.prefix
        size = -(-prefix.length // self.block_size)
        assert load.blocks
        for index, block in load.blocks.items():
            assert 0 <= index < size
            for offset in range(self.block_size):
                self.slots[block, offset] = ("prefix", prefix.name, index)

    def check_prefix(self, sequence):
        prefix = sequence.adapters.prefix
        if prefix is None:
            assert not sequence.prefix_blocks
            return
        assert len(sequence.prefix_blocks) == -(-prefix.length // self.block_size)
        for index, block in enumerate(sequence.prefix_blocks):
            for offset in range(self.block_size):
                assert self.slots[block, offset] == ("prefix", prefix.name, index)

    def slot(self, sequence, position):
        block = sequence.block_table[position // self.block_size]
        return block, position % self.block_size

    def run(self, plan):
        written = Counter(
            self.slot(item.sequence, position)
            for item in plan.scheduled
            for position in range(item.start, item.end)
        )
        assert all(count == 1 for count in written.values())
        for item in plan.scheduled:
            assert 0 <= item.start < item.end <= len(item.sequence.token_ids)
            assert item.samples == (item.end == len(item.sequence.token_ids))
            self.check_past(item.sequence, item.start, coming=written)
        # New blocks hold anything: what someone else still needed there is gone now.
        for load in plan.prefix_loads:
            self.load(load)
        held = Counter(
            tuple(i.sequence.prefix_blocks) for i in plan.scheduled if i.sequence.prefix_blocks
        )
        self.prefixes_shared |= any(count > 1 for count in held.values())
        for item in plan.scheduled:
            covered = len(item.sequence.block_table) * self.block_size
            for position in range(item.start, covered):
                self.slots[self.slot(item.sequence, position)] = "garbage"
        for item in plan.scheduled:
            sequence = item.sequence
            for position in range(item.start, item.end):
                self.slots[self.slot(sequence, position)] = contents(sequence, position)
        for item in plan.scheduled:
            self.check_past(item.sequence, item.end)
            self.check_prefix(item.sequence)
        return [self.result(item) for item in plan.scheduled]

    def check_past(self, sequence, end, coming=()):
        for position in range(end):
            if self.slot(sequence, position) in coming:
                self.shared_in_step = True
                continue
            held = self.slots[self.slot(sequence, position)]
            assert held == contents(sequence, position)

    def result(self, item):
        sequence = item.sequence
        arrival = self.arrivals[sequence.request.request_id]
        if item.samples and arrival.error_at == sequence.num_output_tokens:
            return SequenceResult(None, error="not finite")
        prompt = ()
        if sequence.sampling.prompt_logprobs is not None:
            last = min(item.end, sequence.prompt_len - 1)
            prompt = tuple(
                TokenLogprobs(sequence.token_ids[p], -float(p), 1, [])
                for p in range(item.start + 1, last + 1)
            )
        if not item.samples:
            return SequenceResult(None, prompt_logprobs=prompt)
        depends_on = self.slots[self.slot(sequence, item.end - 1)]
        return SequenceResult(next_token(depends_on), prompt_logprobs=prompt)


SHARED = [0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 0, 2, 2, 0, 1, 0]


def random_use(random):
    """None, one or two adapters; one that acts from the middle of the prompt on; prefixes."""
    count = random.choice([0, 0, 1, 1, 1, 2])
    adapters = tuple(random.sample(sorted(ADAPTER_SIZES), count))
    # Two that do not fit together never run; the real pool would say so as well.
    if sum(ADAPTER_SIZES[adapter] for adapter in adapters) > POOL:
        adapters = adapters[:1]
    salts = [Salt(random.choice([0, 0, 0, 6, 13]), b"%d" % adapter) for adapter in adapters]
    with_prefix = [adapter for adapter in adapters if adapter in PREFIX_LENGTHS]
    prefix = None
    if with_prefix:
        length = sum(PREFIX_LENGTHS[adapter] for adapter in with_prefix)
        prefix = Prefix(b"%r" % with_prefix, length, random.choice([0, length]), tuple(with_prefix))
        salts.append(Salt(0, prefix.name))
    return AdapterUse(adapters, (), prefix, tuple(salts))


def random_arrival(random, number, last_step):
    tail = random.choices(range(3), k=random.randint(0, 5))
    cache_salt = random.choice([None, None, None, "tenant"])
    max_tokens = random.randint(1, 14)
    request = GenerationRequest(
        request_id=f"r{number}",
        prompt_token_ids=[*SHARED[: random.choice([0, 5, 12, 16])], *tail] or [0],
        sampling=SamplingParams(
            max_tokens=max_tokens,
            seed=0,
            min_tokens=random.choice([0, 0, random.randint(1, 14)]),
            end_token_ids=random.choice([(), (), (END,)]),
            stop_token_ids=random.choice([(), (), (STOP,)]),
            prompt_logprobs=random.choice([None, None, None, 0]),
        ),
        cache_salt=cache_salt,
        priority=random.choice([0, 0, -1, 1]),
        output_token_ids=random.choices(range(3), k=random.choice([0, 0, 0, max_tokens // 2])),
    )
    return Arrival(
        request,
        random_use(random),
        step=random.randint(0, last_step),
        abort=random.randint(0, 60) if random.random() < 0.15 else None,
        error_at=random.randint(0, 8) if random.random() < 0.1 else None,
    )


def with_tenant(random, arrival):
    """The same request of one of three tenants, some with a deadline."""
    tenant, weight = random.choice([("a", 1.0), ("b", 1.0), ("c", 3.5)])
    deadline = random.choice([None, None, 1.0, 2.0])
    request = structs.replace(arrival.request, share=Share(tenant, weight), deadline=deadline)
    return replace(arrival, request=request)


def random_trace(seed, tenants=False):
    random = Random(seed)
    seqs = random.randint(1, 7)
    limits = SchedulerLimits(
        seqs,
        vocab_size=VOCAB,
        max_num_batched_tokens=random.choice([seqs, random.randint(seqs, 24), 64]),
        max_model_len=random.choice([2, 16, 30, 48]),
        max_overtakes=random.randint(0, 4),
    )
    block_size = random.choice([1, 2, 3, 4])
    num_blocks = random.randint(20, 64) // block_size
    last_step = random.choice([0, 10, 40])
    arrivals = [random_arrival(random, n, last_step) for n in range(random.randint(1, 20))]
    caching = random.random() < 0.8
    if tenants:
        limits = replace(limits, step_overhead=random.choice([0, 1, 8]))
        arrivals = [with_tenant(random, arrival) for arrival in arrivals]
    return Trace(limits, num_blocks, block_size, caching, arrivals)


class Trace:
    """Plays one trace and checks every step and every end of it."""

    def __init__(self, limits, num_blocks, block_size, caching, arrivals):
        self.limits = limits
        self.slots = FakeSlots()
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(limits, self.blocks, self.slots)
        self.arrivals = {arrival.request.request_id: arrival for arrival in arrivals}
        self.runner = SimulatedRunner(block_size, self.arrivals)
        self.ended = {}
        self.overtaken = False
        self.barred = False
        self.paused = False

    def play(self):
        last = max(arrival.step for arrival in self.arrivals.values())
        bound = last + 30 * sum(
            len(a.request.prompt_token_ids) + a.request.sampling.max_tokens
            for a in self.arrivals.values()
        )
        step = 0
        while step <= last or self.scheduler.has_work:
            assert step <= bound, "some sequence starves"
            self.take_commands(step)
            if self.scheduler.has_work:
                self.run_step()
            step += 1

    def take_commands(self, step):
        for number, (name, arrival) in enumerate(self.arrivals.items()):
            if arrival.step == step:
                self.submit(name, Sequence(arrival.request, arrival.adapters, number))
            if arrival.abort == step:
                live = name not in self.ended and arrival.step <= step
                assert self.scheduler.abort(name) is live
                if live:
                    self.end(name, FinishReason.ABORT)
        self.scheduler.check_integrity()

    def submit(self, name, sequence):
        limit = self.scheduler.max_tokens_that_fit(sequence)
        try:
            self.scheduler.add(sequence)
        except SequenceTooLong:
            assert len(sequence.token_ids) >= limit
            self.end(name, None)
        else:
            assert len(sequence.token_ids) < limit

    def run_step(self):
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self.check_plan(plan)
        updates = self.scheduler.commit(plan, self.runner.run(plan))
        self.scheduler.check_integrity()
        for update in updates:
            assert update.request_id not in self.ended
            self.arrivals[update.request_id].updates.append(update)
            if update.finish_reason is not None:
                self.end(update.request_id, update.finish_reason)

    def check_plan(self, plan):
        assert plan.scheduled
        assert not plan.unservable
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len(plan.scheduled) <= self.scheduler.num_running <= self.limits.max_num_seqs
        planned = {item.sequence for item in plan.scheduled}
        running = self.scheduler._running.values()
        decoding = {seq for seq in running if seq.num_uncomputed_tokens == 1}
        if len({seq.tenant for seq in self.scheduler._sequences.values()}) == 1:
            assert decoding <= planned
        self.paused |= not decoding <= planned
        for sequence in decoding:
            waited = self.scheduler._num_steps - sequence.last_step
            assert waited <= 2 * self.limits.max_num_seqs, "a running sequence starves"
        held = Counter(adapter for seq in running for adapter in seq.adapters.adapter_ids)
        assert +self.slots.held == held
        for sequence in self.scheduler._waiting:
            assert sequence.num_overtaken <= self.limits.max_overtakes
            self.overtaken |= sequence.num_overtaken > 0
            self.barred |= sequence.num_overtaken == self.limits.max_overtakes > 0

    def end(self, name, reason):
        assert name not in self.ended
        self.ended[name] = reason

    def check_ends(self):
        assert self.ended.keys() == self.arrivals.keys()
        assert self.blocks.num_used == 0
        assert self.blocks.num_free == self.blocks.num_blocks
        assert not +self.slots.held
        for name, reason in self.ended.items():
            if reason is not None:
                self.check_output(self.arrivals[name], reason)

    def check_output(self, arrival, reason):
        longest = self.scheduler.max_tokens_that_fit(Sequence(arrival.request, arrival.adapters, 0))
        tokens, expected_reason, stop = arrival.expected(longest)
        tokens = tokens[len(arrival.request.output_token_ids) :]
        got = [token for update in arrival.updates for token in update.token_ids]
        if reason is FinishReason.ABORT:
            assert got == tokens[: len(got)]
            return
        assert (got, reason) == (tokens, expected_reason)
        assert arrival.updates[-1].stop_token_id == stop
        prompt = arrival.request.prompt_token_ids
        sent = [entry for update in arrival.updates for entry in update.prompt_logprobs]
        if arrival.request.sampling.prompt_logprobs is not None and tokens:
            assert [entry.logprob for entry in sent] == [-float(p) for p in range(1, len(prompt))]
            assert [entry.token_id for entry in sent] == prompt[1:]
            if len(prompt) > 1:  # else there is nothing that a cached prefix would leave out
                assert all(update.num_cached_tokens == 0 for update in arrival.updates)


def steps_of(trace):
    """A checksum of what was computed in each step, where, and what was loaded before."""
    checksum = 0
    schedule = trace.scheduler.schedule

    def noted():
        nonlocal checksum
        plan = schedule()
        rows = [
            (i.sequence.request.request_id, i.start, i.end, i.samples, i.sequence.block_table)
            for i in plan.scheduled
        ]
        loads = [dict(load.blocks) for load in plan.prefix_loads]
        checksum = zlib.crc32(repr((rows, loads)).encode(), checksum)
        return plan

    trace.scheduler.schedule = noted
    trace.play()
    return checksum


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_traffic(seed):
    trace = random_trace(seed)
    trace.play()
    trace.check_ends()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_traffic_of_several_tenants(seed):
    trace = random_trace(seed, tenants=True)
    trace.play()
    trace.check_ends()


def test_one_tenant_is_scheduled_as_before_there_were_tenants():
    """The checksum of every step of some traces, taken when the scheduler knew no tenants."""
    checksums = [steps_of(random_trace(seed)) for seed in range(40)]
    assert zlib.crc32(repr(checksums).encode()) == 2207917328


@pytest.mark.parametrize("tenants", [False, True])
def test_the_traffic_reaches_every_part(tenants):
    """Random traces prove nothing about what they do not do."""
    seen = Counter()
    for seed in range(150):
        trace = random_trace(seed, tenants)
        trace.play()
        trace.check_ends()
        seen["preempted"] += trace.scheduler.num_preemptions > 0
        seen["prefix hit"] += trace.blocks.prefix_hits > 0
        seen["shared in the step"] += trace.runner.shared_in_step
        seen["prefix shared"] += trace.runner.prefixes_shared
        seen["overtaken"] += trace.overtaken
        seen["barred"] += trace.barred
        seen["paused"] += trace.paused
        seen.update(set(trace.ended.values()))
    ends = [None, *FinishReason]
    kinds = ["preempted", "prefix hit", "shared in the step", "prefix shared"]
    kinds += ["overtaken", "barred", *ends] + ["paused"] * tenants
    assert all(seen[kind] >= 5 for kind in kinds), seen
