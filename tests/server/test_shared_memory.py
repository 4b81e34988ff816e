"""One memory for blocks and adapters: random traffic, bursts of either side, and the border."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.adapters.device.residency import PoolSize, Residency
from deltamux.server.generation import FinishReason, GenerationRequest, SamplingParams
from deltamux.server.scheduler.block_manager import BlockManager
from deltamux.server.scheduler.errors import KVAccountingError
from deltamux.server.scheduler.limits import SchedulerLimits
from deltamux.server.scheduler.plan import SequenceResult
from deltamux.server.scheduler.scheduler import Scheduler
from deltamux.server.scheduler.sequence import NO_ADAPTER, AdapterUse, Sequence
from deltamux.server.scheduler.shared_memory import Pages, SharedMemory

from .test_scheduler_traces import ADAPTER_SIZES, Trace, random_trace

PAGE = 4


class Region:
    """The adapters' part of the memory, by sizes alone: an adapter is its number of bytes."""

    def __init__(self, num_bytes, slots=99):
        self.limit_bytes = num_bytes
        self.slots = slots
        self.there = Counter()

    @property
    def free_bytes(self):
        return self.limit_bytes - sum(self.there.values())

    @property
    def free(self):
        return PoolSize(self.free_bytes, self.slots - len(self.there))

    def resize(self, limit_bytes):
        assert sum(self.there.values()) <= limit_bytes
        self.limit_bytes = limit_bytes

    def size(self, adapter):
        return PoolSize(adapter, 1)

    def install(self, adapter):
        if not self.size(adapter).within(self.free):
            return None
        place = object()
        self.there[place] = adapter
        return place

    def remove(self, place):
        del self.there[place]

    def check_integrity(self):
        assert self.free_bytes >= 0


class Memory:
    """All parts of a memory of so many pages, of which each side always has ``least``."""

    def __init__(self, count, sizes, least=2, block_size=4, move=None, caching=True):
        self.pages = Pages(count, PAGE, least, least)
        self.region = Region(count * PAGE)
        pins = PoolSize(least * PAGE, 99)
        self.adapters = Residency(self.region, sizes.__getitem__, pins)
        self.blocks = BlockManager(self.pages.most_blocks, block_size, caching)
        move = move or (lambda moves: None)
        self.shared = SharedMemory(self.pages, self.blocks, self.region, self.adapters, move)
        self.adapters.share_with(self.shared)

    def check(self):
        self.blocks.check_integrity()
        self.adapters.check_integrity()
        self.shared.check_integrity()
        used = self.blocks.num_blocks * PAGE + self.region.limit_bytes
        assert used == self.pages.count * PAGE


def sequence(number, prompt, adapter=None, max_tokens=4):
    request = GenerationRequest(
        request_id=str(number),
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
    )
    use = NO_ADAPTER if adapter is None else AdapterUse(adapter_ids=(adapter,))
    return Sequence(request, use, number)


# --- traffic, on the simulated cache that sees every wrong block


class SharedTrace(Trace):
    """A trace whose blocks share their memory with the adapters."""

    def __init__(self, trace, seed):
        random = Random(seed)
        blocks = trace.blocks
        super().__init__(
            trace.limits,
            blocks.num_blocks,
            blocks.block_size,
            blocks._prefix_caching,
            trace.arrivals.values(),
        )
        count = blocks.num_blocks + random.randint(4, 6)
        sizes = {one: size * random.randint(1, PAGE) for one, size in ADAPTER_SIZES.items()}
        self.memory = Memory(
            count, sizes, random.randint(1, 2), blocks.block_size, self.move, blocks._prefix_caching
        )
        self.blocks, self.slots = self.memory.blocks, self
        self.scheduler = Scheduler(self.limits, self.blocks, self.memory.adapters)
        self.random = random
        self.moved = self.lent = 0
        if random.random() < 0.3:
            self.memory.adapters.pin(1)

    @property
    def held(self):
        return Counter(self.memory.adapters._holders)

    def move(self, moves):
        """The contents go with the blocks."""
        self.moved += 1
        size, slots = self.runner.block_size, self.runner.slots
        for source, target in moves:
            for offset in range(size):
                if (source, offset) in slots:
                    slots[target, offset] = slots.pop((source, offset))

    def run_step(self):
        self.memory.shared.now += 1
        adapters = self.memory.adapters
        adapters.bring_back(lambda adapter: self.random.random() < 0.8)
        super().run_step()
        self.memory.check()
        self.lent += self.memory.region.limit_bytes > self.memory.pages.least_adapters * PAGE

    def check_ends(self):
        assert self.blocks.num_used == 0
        assert not self.held
        for adapter in list(self.memory.adapters.resident()):
            self.memory.adapters.drop(adapter)
        assert self.memory.adapters.num_bytes == 0
        assert self.blocks.num_free == self.blocks.most_blocks
        self.memory.check()
        for name, reason in self.ended.items():
            if reason is not None:
                self.check_output(self.arrivals[name], reason)


def play(seed):
    trace = SharedTrace(random_trace(seed), seed)
    trace.play()
    trace.check_ends()
    return trace


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_traffic(seed):
    play(seed)


def test_the_traffic_reaches_every_part():
    seen = Counter()
    for seed in range(80):
        trace = play(seed)
        seen["moved"] += trace.moved > 0
        seen["lent"] += trace.lent > 0
        seen["preempted"] += trace.scheduler.num_preemptions > 0
        seen["prefix hit"] += trace.blocks.prefix_hits > 0
        seen["complete"] += FinishReason.LENGTH in trace.ended.values()
    assert all(count >= 5 for count in seen.values()), seen
    assert len(seen) == 5, seen


# --- bursts


def fill(memory, numbers, length=8):
    """Sequences that come, compute their tokens, and go: their blocks stay findable."""
    for number in numbers:
        memory.shared.now += 1
        one = sequence(number, range(number * 100, number * 100 + length))
        memory.blocks.allocate(one, [], length)
        memory.blocks.publish(one, 0, length)
        memory.blocks.free(one)
        memory.check()


def visit(memory, *adapters):
    for adapter in adapters:
        memory.shared.now += 1
        assert memory.adapters.acquire(adapter)
        memory.adapters.release(adapter)
        memory.check()


def cached(memory, number, length=8):
    one = sequence(1000 + number, range(number * 100, number * 100 + length))
    return len(memory.blocks.find_cached(one, length))


def test_long_contexts_push_out_idle_adapters_down_to_their_minimum():
    memory = Memory(20, dict.fromkeys(range(10), 2 * PAGE))
    visit(memory, *range(9))
    assert len(memory.adapters.resident()) == 9
    long = sequence(0, range(18 * 4))
    assert memory.blocks.can_allocate(long, [], 18 * 4)
    memory.blocks.allocate(long, [], 18 * 4)
    memory.check()
    assert memory.adapters.resident() == [8]
    assert memory.region.limit_bytes == 2 * PAGE
    assert memory.blocks.num_free == 0


def test_many_adapters_shrink_the_prefix_cache_down_to_its_minimum():
    memory = Memory(20, dict.fromkeys(range(20), 2 * PAGE))
    fill(memory, range(9))
    visit(memory, *range(20))
    assert 2 < memory.blocks.num_blocks < 18
    visit(memory, *[*range(20)] * 10)
    assert memory.blocks.num_blocks == 2
    assert len(memory.adapters.resident()) == 9
    assert [cached(memory, number) for number in range(9)].count(2) == 1


def test_what_a_sequence_holds_is_moved_and_never_lost():
    moved = {}
    memory = Memory(12, {1: 6 * PAGE}, move=lambda moves: moved.update(moves))
    others = [sequence(number, range(number, number + 4)) for number in range(10)]
    for one in others:
        memory.blocks.allocate(one, [], 4)
    for one in others[:6]:
        memory.blocks.free(one)
    before = [one.block_table[0] for one in others[6:]]
    visit(memory, 1)
    after = [one.block_table[0] for one in others[6:]]
    assert moved == dict(zip(before, after, strict=True))
    assert max(after) < memory.blocks.num_blocks == 6


def test_what_sequences_hold_keeps_an_adapter_out():
    memory = Memory(12, {1: 6 * PAGE, 2: PAGE})
    one = sequence(0, range(28))
    memory.blocks.allocate(one, [], 28)
    assert memory.adapters.blocks_for(1) == 4
    assert not memory.adapters.acquire(1)
    assert memory.adapters.acquire(2)
    memory.blocks.free(one)
    memory.adapters.release(2)
    assert memory.adapters.acquire(1)
    memory.check()


def test_recently_used_blocks_outlive_idle_adapters_and_old_ones_do_not():
    """A byte of a block costs four times as much to bring back."""
    for steps, survivor in ((3, "blocks"), (40, "adapter")):
        memory = Memory(20, {0: 8 * PAGE, 1: 8 * PAGE, 2: 2 * PAGE})
        fill(memory, range(4))
        memory.shared.now += steps
        visit(memory, 0)
        memory.shared.now += 5
        visit(memory, 1)
        found = sum(cached(memory, number) for number in range(4))
        assert (0 in memory.adapters.resident()) == (survivor == "adapter")
        assert (found == 8) == (survivor == "blocks")


def test_pinned_adapters_stay_through_every_burst():
    memory = Memory(20, dict.fromkeys(range(20), 2 * PAGE))
    assert memory.adapters.pin(5)
    assert not memory.adapters.pin(6)
    memory.adapters.bring_back(lambda adapter: True)
    visit(memory, *range(6, 20))
    fill(memory, range(9), length=60)
    long = sequence(0, range(18 * 4))
    memory.blocks.allocate(long, [], 18 * 4)
    assert memory.adapters.resident() == [5]
    memory.check()


def test_unloading_gives_every_byte_back():
    memory = Memory(20, {1: 7, 2: 9, 3: 30})
    free = memory.blocks.num_free
    visit(memory, 1, 2, 3)
    assert memory.adapters.num_bytes == 46
    for adapter in (1, 2, 3):
        memory.adapters.drop(adapter)
    assert memory.adapters.num_bytes == 0
    assert memory.blocks.num_free == free
    whole = sequence(0, range(free * 4))
    memory.blocks.allocate(whole, [], free * 4)
    memory.check()


def test_mixed_sizes_for_thousands_of_rounds_lose_nothing():
    """Ranks 1 to 256, one to a few held: whatever is not held can always be used."""
    random = Random(0)
    sizes = {number: random.choice((1, 2, 4, 8, 16, 32, 64, 128, 256)) for number in range(200)}
    memory = Memory(400, sizes, least=40)
    held = []
    for _ in range(3000):
        memory.shared.now += 1
        adapter = random.randrange(200)
        room = 360 * PAGE - sum(sizes[one] for one in {*held, adapter})
        assert memory.adapters.acquire(adapter) or room < PAGE
        held.append(adapter)
        while len(held) > 3:
            memory.adapters.release(held.pop(random.randrange(4)))
        memory.check()
        staying = -(-sum(sizes[one] for one in set(held)) // PAGE)
        usable = memory.blocks.num_free * PAGE + staying * PAGE
        assert usable >= 0.9 * 400 * PAGE  # what is left is the minimum of the adapters


def test_a_border_that_cannot_be_is_refused():
    memory = Memory(10, {})
    one = sequence(0, range(32))
    memory.blocks.allocate(one, [], 32)
    for impossible in (0, 7, 9):
        with pytest.raises(KVAccountingError, match="cannot become"):
            memory.blocks.resize(impossible)
    memory.check()


# --- with a scheduler


def test_more_adapters_than_fit_beside_long_contexts_change_throughput_smoothly():
    """From half of what fits beside the contexts to eight times as many."""
    rates = []
    for share in (0.5, 1, 2, 4, 8):
        random = Random(1)
        count = max(int(8 * share), 1)
        memory = Memory(128, dict.fromkeys(range(count), 8 * PAGE), least=12)
        scheduler = Scheduler(SchedulerLimits(8, 64, 64, 10_000), memory.blocks, memory.adapters)
        arrived = tokens = 0
        for _ in range(500):
            while scheduler.num_waiting < 32:
                arrived += 1
                prompt = random.choices(range(9_000), k=16)
                scheduler.add(sequence(arrived, prompt, random.randrange(count), 12))
            memory.shared.now += 1
            plan = scheduler.schedule()
            tokens += len(plan.scheduled)
            results = [SequenceResult(7 if each.samples else None) for each in plan.scheduled]
            scheduler.commit(plan, results)
            memory.check()
            scheduler.check_integrity()
        assert scheduler.num_preemptions < 0.05 * arrived
        rates.append(tokens)
    assert min(rates) > 0.8 * max(rates)
