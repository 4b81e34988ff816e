"""The books of the KV cache: who holds what, what can be found again, and what must not be."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from deltamux.server.generation import GenerationRequest, SamplingParams
from deltamux.server.scheduler.block_hash import block_hashes, chain_hash, root_hash
from deltamux.server.scheduler.block_manager import BlockManager
from deltamux.server.scheduler.errors import KVAccountingError
from deltamux.server.scheduler.sequence import AdapterUse, Prefix, Salt, Sequence


def sequence(tokens, salt=b"base", prefix=None):
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=list(tokens),
        sampling=SamplingParams(max_tokens=100, seed=0),
    )
    return Sequence(request, AdapterUse(prefix=prefix, salts=(Salt(0, salt),)), arrival=0)


def compute(blocks, seq, end=None):
    """Admit ``seq`` as the scheduler does and compute its first ``end`` tokens; cached tokens."""
    cached = blocks.find_cached(seq, len(seq.token_ids) - 1)
    start = len(cached) * blocks.block_size
    blocks.allocate(seq, cached, len(seq.token_ids))
    seq.num_computed_tokens = len(seq.token_ids) if end is None else end
    blocks.publish(seq, start, seq.num_computed_tokens)
    blocks.check_integrity()
    return start


def test_blocks_that_a_step_fills_can_be_shared_in_it():
    blocks = BlockManager(8, 4)
    first, second = sequence(range(10)), sequence(range(10))
    blocks.allocate(first, [], 10)
    coming = blocks.filled(first, 0, 7)
    assert list(coming.values()) == first.block_table[:1]
    assert blocks.find_cached(second, 9) == []
    assert blocks.find_cached(second, 9, coming) == first.block_table[:1]
    coming = blocks.filled(first, 0, 10)
    cached = blocks.find_cached(second, 9, coming)
    assert cached == first.block_table[:2]
    blocks.allocate(second, cached, 10)
    assert blocks.num_used == 4
    blocks.check_integrity()
    assert blocks.find_cached(sequence(range(10)), 9) == []  # nothing is computed yet
    assert blocks.find_cached(sequence(range(10), b"other"), 9, coming) == []


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 1)])
def test_refuses_an_empty_cache(num_blocks, block_size):
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(num_blocks, block_size)


def test_allocates_what_covers_the_tokens_and_takes_it_back():
    blocks = BlockManager(5, 4)
    seq = sequence(range(9))
    compute(blocks, seq)
    assert (len(seq.block_table), blocks.num_used, blocks.num_free) == (3, 3, 2)
    assert blocks.extend(seq, 12)
    assert len(seq.block_table) == 3
    assert blocks.extend(seq, 13)
    assert len(set(seq.block_table)) == 4
    assert not blocks.extend(seq, 21)
    assert len(seq.block_table) == 4
    blocks.free(seq)
    blocks.check_integrity()
    assert (seq.block_table, blocks.num_used, blocks.num_free) == ([], 0, 5)


def test_holding_twice_and_freeing_twice_are_defects():
    blocks = BlockManager(4, 4)
    seq = sequence(range(4))
    compute(blocks, seq)
    with pytest.raises(KVAccountingError, match="it holds 1 blocks"):
        blocks.allocate(seq, [], 4)
    blocks.free(seq)
    with pytest.raises(KVAccountingError, match="no blocks to free"):
        blocks.free(seq)
    with pytest.raises(KVAccountingError, match="4 are free"):
        blocks.allocate(seq, [], 17)


def test_a_running_sequence_shares_its_full_blocks():
    blocks = BlockManager(8, 4)
    first, second = sequence([*range(10)]), sequence([*range(8), 77, 78])
    compute(blocks, first)
    assert compute(blocks, second) == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert blocks.num_used == 4


def test_the_last_token_is_never_taken_from_the_cache():
    blocks = BlockManager(8, 4)
    compute(blocks, sequence(range(8)))
    assert compute(blocks, sequence(range(8))) == 4
    assert compute(blocks, sequence(range(9))) == 8


def test_limit_bounds_the_prefix():
    blocks = BlockManager(8, 4)
    seq = sequence(range(12))
    compute(blocks, seq)
    assert [len(blocks.find_cached(seq, limit)) for limit in (0, 3, 4, 11, 12, 99)] == [
        0, 0, 1, 2, 3, 3,
    ]  # fmt: skip


def test_only_computed_blocks_can_be_found():
    blocks = BlockManager(8, 4)
    seq = sequence(range(12))
    compute(blocks, seq, end=7)
    assert len(blocks.find_cached(sequence(range(12)), 12)) == 1
    blocks.publish(seq, 7, 8)
    assert len(blocks.find_cached(sequence(range(12)), 12)) == 2


def test_another_salt_or_another_beginning_finds_nothing():
    blocks = BlockManager(8, 4)
    compute(blocks, sequence(range(12), b"adapter-1"))
    assert blocks.find_cached(sequence(range(12), b"adapter-2"), 12) == []
    assert blocks.find_cached(sequence([9, *range(1, 12)], b"adapter-1"), 12) == []


def test_caching_turned_off_finds_and_counts_nothing():
    blocks = BlockManager(8, 4, enable_prefix_caching=False)
    seq = sequence(range(12))
    compute(blocks, seq)
    assert compute(blocks, sequence(range(12))) == 0
    blocks.record_lookup(12, 0)
    assert (blocks.prefix_queries, blocks.prefix_hits) == (0, 0)
    assert seq.block_hashes == []


def test_freed_contents_stay_findable_until_their_block_is_reused():
    blocks = BlockManager(4, 4)
    old, new = sequence(range(8)), sequence(range(100, 108))
    compute(blocks, old)
    compute(blocks, new)
    blocks.free(old)
    blocks.free(new)
    assert blocks.num_free == 4
    other = sequence(range(200, 204))
    compute(blocks, other)  # takes the end of the prefix that was freed first
    assert len(blocks.find_cached(old, 8)) == 1
    assert len(blocks.find_cached(new, 8)) == 2
    blocks.extend(other, 8)
    assert (blocks.find_cached(old, 8), len(blocks.find_cached(new, 8))) == ([], 2)
    blocks.check_integrity()


def test_a_hit_makes_a_cached_block_recent_again():
    blocks = BlockManager(2, 4)
    for start in (0, 100):
        seq = sequence(range(start, start + 4))
        compute(blocks, seq)
        blocks.free(seq)
    follow_up = sequence([0, 1, 2, 3])
    blocks.allocate(follow_up, blocks.find_cached(follow_up, 4), 4)
    blocks.free(follow_up)
    blocks.allocate(other := sequence(range(200, 204)), [], 4)
    assert len(blocks.find_cached(follow_up, 4)) == 1
    assert blocks.find_cached(sequence(range(100, 104)), 4) == []
    blocks.free(other)


def test_cached_free_blocks_count_as_taken_by_their_hit():
    blocks = BlockManager(3, 4)
    seq = sequence(range(8))
    compute(blocks, seq)
    cached = blocks.find_cached(seq, 8)
    assert blocks.can_allocate(seq, cached, 12)  # shared blocks cost nothing
    assert not blocks.can_allocate(seq, cached, 12, spare=1)
    blocks.free(seq)
    assert blocks.can_allocate(seq, cached, 12)
    assert not blocks.can_allocate(seq, cached, 13)
    assert not blocks.can_allocate(seq, cached, 12, spare=1)


def test_a_duplicate_stays_private():
    blocks = BlockManager(4, 4)
    first, twin = sequence(range(8)), sequence(range(8))
    for seq in (first, twin):
        blocks.allocate(seq, [], 8)
    for seq in (first, twin):
        blocks.publish(seq, 0, 8)
        blocks.check_integrity()
    assert blocks.find_cached(twin, 8) == first.block_table
    blocks.free(first)
    assert blocks.find_cached(twin, 8) != twin.block_table
    blocks.free(twin)
    blocks.check_integrity()
    assert len(blocks.find_cached(twin, 8)) == 2


def test_forgotten_contents_cannot_be_found():
    blocks = BlockManager(4, 4)
    seq = sequence(range(8))
    compute(blocks, seq)
    blocks.forget(seq)
    blocks.check_integrity()
    blocks.free(seq)
    blocks.check_integrity()
    assert blocks.find_cached(seq, 8) == []


def test_statistics_count_tokens():
    blocks = BlockManager(8, 4)
    blocks.record_lookup(10, 0)
    blocks.record_lookup(10, 8)
    assert (blocks.prefix_queries, blocks.prefix_hits) == (20, 8)


def test_hashes_are_chained_and_computed_once(monkeypatch):
    seq = sequence(range(12))
    names = list(block_hashes(seq, 3, 4))
    assert names[0] == chain_hash(root_hash(b""), [0, 1, 2, 3], [b"base"])
    assert names[2] == chain_hash(names[1], [8, 9, 10, 11])
    assert len(set(names)) == 3
    monkeypatch.setattr("deltamux.server.scheduler.block_hash.chain_hash", None)
    assert block_hashes(seq, 3, 4) == names


def test_a_salt_cannot_imitate_a_block():
    """A client chooses part of the salt; it must not name what another's block holds."""
    previous, packed = root_hash(b"victim"), b"\1\0\0\0"
    assert chain_hash(previous, [1]) != root_hash(previous + packed)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda blocks, seq: blocks._free.append(seq.block_table[0]),
        lambda blocks, _: blocks._free.pop(),
        lambda _, seq: seq.block_table.append(seq.block_table[0]),
        lambda _, seq: seq.block_table.pop(),
        lambda blocks, _: blocks._block_of.clear(),
        lambda blocks, seq: blocks._block_of.update({b"elsewhere": seq.block_table[0]}),
        lambda blocks, _: blocks._holders.clear(),
    ],
)
def test_integrity_check_sees_what_does_not_balance(corrupt):
    blocks = BlockManager(4, 4)
    seq = sequence(range(8))
    compute(blocks, seq)
    corrupt(blocks, seq)
    with pytest.raises(KVAccountingError):
        blocks.check_integrity()


def prefixed(name, length, tokens=range(5)):
    return sequence(tokens, name, Prefix(name, length, length, (1,)))


def test_a_prefix_is_written_once_and_shared_also_without_prefix_caching():
    blocks = BlockManager(8, 4, enable_prefix_caching=False)
    first, second = prefixed(b"p", 6), prefixed(b"p", 6)
    load = blocks.allocate(first, [], 5)
    assert (load.prefix, list(load.blocks)) == (first.adapters.prefix, [0, 1])
    assert list(load.blocks.values()) == first.prefix_blocks
    assert blocks.allocate(second, [], 5) is None
    assert second.prefix_blocks == first.prefix_blocks
    assert blocks.num_used == 2 + 2 + 2
    blocks.check_integrity()
    blocks.free(first)
    blocks.free(second)
    assert (blocks.num_used, first.prefix_blocks) == (0, [])
    assert blocks.allocate(third := prefixed(b"p", 6), [], 5) is None
    assert third.prefix_blocks == list(load.blocks.values())


def test_an_idle_prefix_gives_up_its_room_and_only_what_is_gone_is_written_again():
    blocks = BlockManager(5, 4)
    load = blocks.allocate(first := prefixed(b"p", 8), [], 4)
    blocks.free(first)
    blocks.allocate(other := sequence(range(16)), [], 16)  # takes one of the prefix's two blocks
    assert blocks.num_free == 1
    assert not blocks.can_allocate(prefixed(b"p", 8), [], 4)
    blocks.free(other)
    again = blocks.allocate(second := prefixed(b"p", 8), [], 4)
    assert len(again.blocks) == 1
    kept = 1 - next(iter(again.blocks))
    assert second.prefix_blocks[kept] == load.blocks[kept]
    blocks.check_integrity()


def test_a_salt_that_begins_later_leaves_the_blocks_before_it_to_be_shared():
    blocks = BlockManager(8, 4)
    request = sequence(range(12)).request
    plain = Sequence(request, AdapterUse(), arrival=0)
    late = Sequence(request, AdapterUse(salts=(Salt(9, b"adapter"),)), arrival=1)
    compute(blocks, plain)
    assert blocks.find_cached(late, 12) == plain.block_table[:2]
    assert block_hashes(late, 3, 4)[2] != block_hashes(plain, 3, 4)[2]


class BlockManagerMachine(RuleBasedStateMachine):
    """Random use; a model of the cache says what every block holds, which hits must be."""

    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(7, 2)
        self.contents = {}

    def write(self, seq, start, end):
        for index in range(start // 2, -(-end // 2)):
            tokens = tuple(seq.token_ids[: min(end, 2 * index + 2)])
            self.contents[seq.block_table[index]] = (seq.adapters.salts[0].value, tokens)

    @rule(
        target=held,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        salt=st.sampled_from([b"a", b"b"]),
        prefix_length=st.sampled_from([0, 0, 1, 3, 4]),
        computed=st.integers(0, 9),
    )
    def admit(self, tokens, salt, prefix_length, computed):
        name = salt + bytes([prefix_length])
        prefix = Prefix(name, prefix_length, 0, (1,)) if prefix_length else None
        seq = sequence(tokens, name if prefix_length else salt, prefix)
        salt = seq.adapters.salts[0].value
        cached = self.blocks.find_cached(seq, len(tokens) - 1)
        for index, block in enumerate(cached):
            assert self.contents[block] == (salt, tuple(tokens[: 2 * index + 2]))
        if self.blocks.can_allocate(seq, cached, len(tokens)):
            load = self.blocks.allocate(seq, cached, len(tokens))
            for index, block in {} if load is None else load.blocks.items():
                self.contents[block] = ("prefix", name, index)
            assert len(seq.prefix_blocks) == -(-prefix_length // 2)
            self.prefixes_are_whole(seq)
            start = seq.num_computed_tokens = 2 * len(cached)
            for block in seq.block_table[len(cached) :]:
                self.contents[block] = "garbage"
            self.advance(seq, max(start, min(computed, len(tokens))))
        return seq

    def prefixes_are_whole(self, seq):
        for index, block in enumerate(seq.prefix_blocks):
            assert self.contents[block] == ("prefix", seq.adapters.prefix.name, index)

    @rule(seq=held, token=st.integers(0, 1))
    def grow(self, seq, token):
        if not seq.block_table:
            return
        self.prefixes_are_whole(seq)
        seq.token_ids.append(token)
        if self.blocks.extend(seq, len(seq.token_ids)):
            self.advance(seq, len(seq.token_ids))
        else:
            assert self.blocks.num_free == 0
            seq.token_ids.pop()

    def advance(self, seq, end):
        start = seq.num_computed_tokens
        self.write(seq, start, end)
        seq.num_computed_tokens = end
        self.blocks.publish(seq, start, end)

    @rule(seq=consumes(held), poisoned=st.booleans())
    def release(self, seq, poisoned):
        if not seq.block_table:
            return
        if poisoned:
            self.blocks.forget(seq)
        self.blocks.free(seq)

    @invariant()
    def balanced(self):
        self.blocks.check_integrity()
        assert self.blocks.num_free + self.blocks.num_used == 7


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
