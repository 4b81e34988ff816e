"""Pinned adapters on the device, in a pool that knows sizes alone."""

import pytest

from deltamux.adapters.device.residency import PoolSize, Residency

from ..server.test_residency_policy import Memory


def residency(room=3):
    return Residency(Memory(room), lambda adapter: adapter, PoolSize(2, 2))


def everything_is_ready(adapter):
    return True


def visit(tier, *adapters):
    """Each is used once and then idle."""
    for adapter in adapters:
        assert tier.acquire(adapter)
        tier.release(adapter)
        tier.check_integrity()


def test_a_pinned_adapter_is_brought_in_and_stays():
    tier = residency()
    assert tier.pin(1)
    tier.bring_back(everything_is_ready)
    visit(tier, 2, 3, 4, 5, 2)
    assert set(tier.resident()) == {1, 5, 2}
    tier.unpin(1)
    visit(tier, 3)
    assert set(tier.resident()) == {5, 2, 3}


def test_one_that_is_not_in_host_memory_comes_later():
    tier = residency()
    tier.pin(1)
    tier.bring_back(lambda adapter: False)
    assert tier.resident() == []
    tier.bring_back(everything_is_ready)
    assert tier.resident() == [1]


def test_more_than_their_share_is_not_pinned():
    tier = residency()
    assert [tier.pin(1), tier.pin(2), tier.pin(2), tier.pin(3)] == [True, True, True, False]
    tier.bring_back(everything_is_ready)
    assert tier.resident() == [1, 2]
    tier.drop(1)
    assert tier.pin(3)


def test_held_adapters_are_not_pushed_out_for_a_pinned_one():
    tier = residency(room=2)
    assert tier.acquire(1, 2)
    tier.pin(3)
    tier.bring_back(everything_is_ready)
    assert tier.resident() == [1, 2]
    tier.release(1)
    tier.bring_back(everything_is_ready)
    assert set(tier.resident()) == {2, 3}


@pytest.mark.parametrize("expected", [(3, 1), (4, 3, 1)])
def test_what_is_needed_last_goes_first(expected):
    tier = residency(room=2)
    visit(tier, 1, 3)
    tier.expect(expected)
    visit(tier, 2)
    assert set(tier.resident()) == {3, 2}
