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

    @rule(sizes=st.lists(st.integers(1, 300), max_size=6))
    def allocate(self, sizes):
        before = self.extents.free
        starts = self.extents.allocate(sizes)
        if starts is None:
            assert self.extents.free == before
        else:
            assert len(starts) == len(sizes)
            self.owned.append(dict(zip(starts, sizes, strict=True)))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.owned) - 1))
        self.extents.release(list(self.owned.pop(index)))

    @rule()
    def try_on_a_copy(self):
        twin = self.extents.copy()
        for group in self.owned:
            twin.release(list(group))
        twin.check_integrity()
        assert twin.free == twin.capacity
        assert twin.allocate([twin.capacity]) == [0]

    @invariant()
    def books_balance(self):
        self.extents.check_integrity()
        spans = sorted((s, s + n) for group in self.owned for s, n in group.items())
        assert all(start % ALIGNMENT == 0 for start, _ in spans)
        assert all(end <= after for (_, end), (after, _) in pairwise(spans))
        assert all(end <= 1003 for _, end in spans)
        used = sum(self.extents.padded(end - start) for start, end in spans)
        assert used + self.extents.free == self.extents.capacity


TestTrace = Trace.TestCase


@given(st.lists(st.integers(1, 90), max_size=9))
def test_what_fits_when_empty_fits_in_any_order(sizes):
    extents = Extents(400, ALIGNMENT)
    fits = sum(map(extents.padded, sizes)) <= extents.capacity
    assert (extents.allocate(sizes) is not None) == fits


def test_the_books_of_a_copy_are_its_own():
    extents = Extents(64, ALIGNMENT)
    twin = extents.copy()
    assert twin.allocate([64]) == [0]
    assert extents.free == 64


def test_releasing_what_is_not_owned():
    extents = Extents(64, ALIGNMENT)
    starts = extents.allocate([8, 8])
    extents.release(starts[:1])
    for start in (starts[0], 3, 4096):
        with pytest.raises(ExtentError, match=str(start)):
            extents.release([start])


def test_without_capacity_nothing_fits():
    extents = Extents(ALIGNMENT - 1, ALIGNMENT)
    assert extents.allocate([1]) is None
    assert extents.allocate([]) == []
    extents.check_integrity()
