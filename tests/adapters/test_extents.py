"""The allocator's books against a list of what is owned, over random traces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltamux.adapters.device.extents import ExtentError, Extents

ALIGNMENT = 8


class Trace(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(1003, ALIGNMENT)
        self.owned: list[dict[int, int]] = []
        self.memory = [0] * self.extents.capacity

    @rule(sizes=st.lists(st.integers(1, 300), max_size=6), limit=st.integers(0, 1000))
    def allocate(self, sizes, limit):
        before = self.extents.free
        starts = self.extents.allocate(sizes, limit)
        if starts is None:
            assert self.extents.free == before
        else:
            assert len(starts) == len(sizes)
            assert all(start + size <= limit for start, size in zip(starts, sizes, strict=True))
            self.owned.append(dict(zip(starts, sizes, strict=True)))
            for start, size in self.owned[-1].items():
                self.writes += 1
                self.memory[start : start + size] = [self.writes] * size

    writes = 0

    def make(self, moves):
        """Move what is owned, and what is written there."""
        for source, target, size in moves:
            self.memory[target : target + size] = self.memory[source : source + size]
            [group] = [group for group in self.owned if source in group]
            group[target] = group.pop(source)

    @rule(limit=st.integers(0, 1000))
    def settle(self, limit):
        if self.extents.used > limit:
            with pytest.raises(ExtentError, match=f"do not fit into {limit}"):
                self.extents.settle(limit)
            return
        before = dict(self.extents._used)
        moves = self.extents.settle(limit)
        self.make(moves)
        assert self.extents.span <= limit
        if all(start + size <= limit for start, size in before.items()):
            assert not moves

    @rule()
    def pack(self):
        self.make(self.extents.pack())
        assert self.extents.span == self.extents.used
        free = self.extents.free
        if free:
            [start] = self.extents.allocate([free], self.extents.capacity)
            self.extents.release([start])

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.owned) - 1))
        self.extents.release(list(self.owned.pop(index)))

    @invariant()
    def books_balance(self):
        self.extents.check_integrity()
        spans = sorted((s, s + n) for group in self.owned for s, n in group.items())
        assert all(start % ALIGNMENT == 0 for start, _ in spans)
        assert all(end <= after for (_, end), (after, _) in pairwise(spans))
        assert all(end <= 1003 for _, end in spans)
        used = sum(self.extents.padded(end - start) for start, end in spans)
        assert used + self.extents.free == self.extents.capacity
        contents = [set(self.memory[start:end]) for start, end in spans]
        assert all(len(each) == 1 for each in contents)
        assert len(set().union(*contents)) == len(contents)


TestTrace = Trace.TestCase


@given(st.lists(st.integers(1, 90), max_size=9))
def test_what_fits_when_empty_fits_in_any_order(sizes):
    extents = Extents(400, ALIGNMENT)
    fits = sum(map(extents.padded, sizes)) <= extents.capacity
    assert (extents.allocate(sizes, extents.capacity) is not None) == fits


def test_only_what_lies_behind_the_limit_moves_if_there_are_holes_for_it():
    extents = Extents(800, ALIGNMENT)
    starts = extents.allocate([80] * 10, 800)
    extents.release([starts[1], starts[4]])
    assert extents.settle(640) == [(720, 80, 80), (640, 320, 80)]


def test_releasing_what_is_not_owned():
    extents = Extents(64, ALIGNMENT)
    starts = extents.allocate([8, 8], 64)
    extents.release(starts[:1])
    for start in (starts[0], 3, 4096):
        with pytest.raises(ExtentError, match=str(start)):
            extents.release([start])


def test_without_capacity_nothing_fits():
    extents = Extents(ALIGNMENT - 1, ALIGNMENT)
    assert extents.allocate([1], 8) is None
    assert extents.allocate([], 8) == []
    extents.check_integrity()
