"""The host tier with a scripted loader: what is kept, dropped, read again and refused."""

import os
import select
import threading
from pathlib import Path

import pytest
import torch

from deltamux.adapters.errors import AdapterCorrupt, AdapterNotFound, AdapterTooLarge
from deltamux.adapters.layout import LinearTarget
from deltamux.adapters.primitives.linear import Affine
from deltamux.adapters.primitives.lowered import LoweredAdapter, Part
from deltamux.adapters.scope import EveryPosition
from deltamux.server.engine.host_tier import HostTier, _Source

TARGET = LinearTarget("m", 0, 4, 100, False)
ADAPTER_BYTES = 400


def make_adapter(digest: str, copies: int = 1) -> LoweredAdapter:
    affine = Affine(TARGET, bias=torch.zeros(100 * copies))
    return LoweredAdapter(digest, "lora", "peft", (Part(EveryPosition(), (affine,)),))


class Shelf:
    """Folders by name, and a log of what was read."""

    def __init__(self):
        self.folders = {}
        self.read = []

    def lower(self, path: Path) -> LoweredAdapter:
        self.read.append(path.name)
        outcome = self.folders[path.name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def tier(shelf):
    tier = HostTier(shelf.lower, budget=3 * ADAPTER_BYTES)
    yield tier
    tier.close()


def wait_for_load(tier):
    readable, _, _ = select.select([tier.wakeup], [], [], 10)
    assert readable, "no load ended"
    os.eventfd_read(tier.wakeup)
    return tier.completed()


def register(tier, shelf, adapter_id, outcome, digest=None):
    shelf.folders[str(adapter_id)] = outcome
    tier.register(adapter_id, Path(str(adapter_id)), digest)
    [result] = wait_for_load(tier)
    return result


def test_a_load_is_ready_once_it_is_taken_in(tier, shelf):
    adapter = make_adapter("d1")
    result = register(tier, shelf, 1, adapter)
    assert (result.adapter_id, result.outcome) == (1, adapter)
    assert tier.hold(1)
    assert tier.lowered(1) is adapter


def test_the_least_recently_used_idle_adapter_is_dropped_and_read_again(tier, shelf):
    for adapter_id in (1, 2, 3):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    tier.hold(1)
    tier.release(1)
    register(tier, shelf, 4, make_adapter("d4"))
    assert sorted(tier.ready()) == [1, 3, 4]
    assert not tier.hold(2)
    [result] = wait_for_load(tier)
    assert result.adapter_id == 2
    assert shelf.read == ["1", "2", "3", "4", "2"]
    assert 2 in tier.ready()


def test_a_load_waits_while_held_adapters_fill_the_budget(tier, shelf):
    for adapter_id in range(1, 6):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    for adapter_id in (1, 2, 3):
        if not tier.hold(adapter_id):
            wait_for_load(tier)
    assert not tier.hold(4)
    assert not tier.hold(5)
    read = len(shelf.read)
    assert sorted(tier.ready()) == [1, 2, 3]
    tier.release(2)
    [result] = wait_for_load(tier)
    assert result.adapter_id == 4
    assert sorted(tier.ready()) == [1, 3, 4]
    assert len(shelf.read) == read + 1
    tier.release(1)
    [result] = wait_for_load(tier)
    assert result.adapter_id == 5


def test_changed_files_are_refused_when_read_again(tier, shelf):
    register(tier, shelf, 1, make_adapter("d1"))
    for adapter_id in (2, 3, 4):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    shelf.folders["1"] = make_adapter("other")
    assert not tier.hold(1)
    [result] = wait_for_load(tier)
    assert isinstance(result.outcome, AdapterCorrupt)
    assert "changed since" in str(result.outcome)


def test_refusals_and_surprises_become_adapter_errors(tier, shelf):
    refusal = register(tier, shelf, 1, AdapterNotFound("no such folder"))
    assert isinstance(refusal.outcome, AdapterNotFound)
    surprise = register(tier, shelf, 2, ZeroDivisionError("oops"))
    assert isinstance(surprise.outcome, AdapterCorrupt)
    assert "ZeroDivisionError: oops" in str(surprise.outcome)
    big = register(tier, shelf, 3, make_adapter("d3", copies=4))
    assert isinstance(big.outcome, AdapterTooLarge)
    assert "--host-memory-budget" in str(big.outcome)


def test_two_requests_share_one_load(tier, shelf):
    register(tier, shelf, 1, make_adapter("d1"))
    for adapter_id in (2, 3, 4):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    assert not tier.hold(1)
    assert not tier.hold(1)
    wait_for_load(tier)
    assert shelf.read.count("1") == 2
    tier.release(1)
    assert tier.is_held(1)
    tier.release(1)
    assert not tier.is_held(1)


def test_a_forgotten_adapter_does_not_come_back(shelf):
    gate = threading.Event()

    def slow(path):
        assert gate.wait(10)
        return make_adapter("d1")

    tier = HostTier(slow, budget=ADAPTER_BYTES)
    tier.register(1, Path("1"), None)
    tier.forget(1)
    gate.set()
    assert wait_for_load(tier) == []
    assert tier.ready() == []
    tier.close()


def test_a_held_adapter_cannot_be_forgotten(tier, shelf):
    register(tier, shelf, 1, make_adapter("d1"))
    tier.hold(1)
    with pytest.raises(ValueError, match="held by 1"):
        tier.forget(1)


def changes(tier):
    change = tier.changes()
    return None if change is None else (change.added, change.dropped)


def test_what_came_and_what_went_is_told_once(tier, shelf):
    for adapter_id in (1, 2, 3):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    assert changes(tier) == ([1, 2, 3], [])
    assert changes(tier) is None
    register(tier, shelf, 4, make_adapter("d4"))
    assert changes(tier) == ([4], [1])
    tier.forget(4)
    register(tier, shelf, 5, make_adapter("d5"))
    tier.forget(5)
    assert changes(tier) == ([], [4])


def test_a_pinned_adapter_stays_where_others_go(tier, shelf):
    for adapter_id in (1, 2, 3):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    tier.pin(1)
    for adapter_id in (4, 5, 6):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
        assert 1 in tier.ready()
    tier.unpin(1)
    for adapter_id in (7, 8):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    assert 1 not in tier.ready()


def test_an_adapter_that_is_pinned_is_loaded(tier, shelf):
    for adapter_id in (1, 2, 3, 4):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    assert 1 not in tier.ready()
    tier.pin(1)
    assert [result.adapter_id for result in wait_for_load(tier)] == [1]
    assert 1 in tier.ready()


def test_a_load_waits_for_held_adapters_rather_than_for_pinned_ones(tier, shelf):
    for adapter_id in (4, 1, 2, 3):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    tier.pin(1)
    assert tier.hold(2)
    assert tier.hold(3)
    read = len(shelf.read)
    assert not tier.hold(4)
    assert (len(shelf.read), tier.ready()) == (read, [1, 2, 3])
    tier.release(2)
    assert [result.adapter_id for result in wait_for_load(tier)] == [4]
    assert sorted(tier.ready()) == [1, 3, 4]


def test_a_pinned_adapter_makes_way_for_one_that_fits_only_alone_and_comes_back(tier, shelf):
    register(tier, shelf, 1, make_adapter("d1"))
    tier.pin(1)
    register(tier, shelf, 2, make_adapter("d2", copies=3))
    assert tier.ready() == [1]  # nothing needs the other
    assert not tier.hold(2)
    wait_for_load(tier)
    assert tier.ready() == [2]
    tier.release(2)
    assert [result.adapter_id for result in wait_for_load(tier)] == [1]
    assert tier.ready() == [1]


def test_a_request_of_several_adapters_is_not_kept_out_by_pins(tier, shelf):
    for adapter_id in (1, 2, 3, 4, 5):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    tier.pin(4)
    tier.pin(5)
    missing = {one for one in (1, 2, 3) if not tier.hold(one, first=True)}
    while missing:
        missing -= {result.adapter_id for result in wait_for_load(tier)}
    assert sorted(tier.ready()) == [1, 2, 3]
    back: set[int] = set()
    for one in (1, 2, 3):
        tier.release(one)
    while back != {4, 5}:
        back |= {result.adapter_id for result in wait_for_load(tier)}
    assert {4, 5} < {*tier.ready()}


def test_a_pinned_adapter_that_is_refused_is_not_read_for_ever(tier, shelf):
    for adapter_id in (1, 2, 3, 4):
        register(tier, shelf, adapter_id, make_adapter(f"d{adapter_id}"))
    shelf.folders["1"] = AdapterNotFound("gone")
    tier.pin(1)
    [result] = wait_for_load(tier)
    assert isinstance(result.outcome, AdapterNotFound)
    read = len(shelf.read)
    tier.hold(4)
    tier.release(4)
    assert len(shelf.read) == read


def test_tenants_take_turns_in_being_read_for(shelf):
    shelf.folders = {str(one): make_adapter(str(one)) for one in range(20)}
    tier = HostTier(shelf.lower, budget=100 * ADAPTER_BYTES)
    try:
        for one in range(20):
            tier._sources[one] = _Source(Path(str(one)), None)
        for one in range(15):
            tier.hold(one, tenant="flood")
        for one in (15, 16, 3):
            tier.hold(one, tenant="steady")
        tier.hold(17, first=True, tenant="urgent")
        while len(tier.ready()) < 18:
            wait_for_load(tier)
        assert shelf.read[2] == "17"
        assert {"15", "16", "3"} <= set(shelf.read[:9])
        assert len(shelf.read) == 18
    finally:
        tier.close()
