"""What tenants get of a machine they share: simulated, with neither a model nor a clock."""

import asyncio
from random import Random

import numpy as np
import pytest
from msgspec import structs

from deltamux.server.engine.client import EngineClient
from deltamux.server.engine.errors import QueueFull
from deltamux.server.generation import BeamSearch, Share

from .harness import engine_config, make_request
from .market import Market

SIZES = {"a": (300, 4), "b": (8, 60), "c": (64, 64), "d": (150, 10), "e": (16, 16)}
"""Tokens of prompt and output, by tenant."""


def jain(values):
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def keep_asking(market, tenants, least=6, weights=None):
    """Have some requests of every tenant wait, of sizes around its own."""
    random = Random(len(market.told))
    for tenant in tenants:
        prompt, output = SIZES[tenant]
        while market.waiting(tenant) < least:
            size = prompt * random.randint(70, 130) // 100, output * random.randint(70, 130) // 100
            market.ask(tenant, *map(max, size, (1, 1)), weight=(weights or {}).get(tenant, 1.0))


def test_tenants_with_requests_of_unequal_sizes_get_equal_service():
    market = Market()
    for _ in range(1000):
        keep_asking(market, SIZES)
        market.step()
    assert jain([market.service[tenant] for tenant in SIZES]) > 0.99


def test_service_follows_the_weights():
    weights = {"b": 1.0, "c": 2.0, "d": 4.0}
    market = Market()
    for _ in range(1500):
        keep_asking(market, weights, weights=weights)
        market.step()
    per_weight = [market.service[tenant] / weight for tenant, weight in weights.items()]
    assert max(per_weight) / min(per_weight) < 1.05


@pytest.mark.parametrize("blocks", [400, 120])
def test_of_two_who_always_wait_none_gets_further_ahead_than_the_theorem_says(blocks):
    """VTC, theorem 4.4: 2 max(w_p * longest prompt, w_q * tokens that the batch holds)."""
    market = Market(blocks=blocks)
    bound = 2 * max(390, 2 * blocks * 4)
    most = 0
    for _ in range(800):
        keep_asking(market, "ab")
        market.step()
        most = max(most, abs(market.service["a"] - market.service["b"]))
    assert 0 < most <= bound


def test_being_idle_is_no_credit():
    market = Market()
    for _ in range(300):
        keep_asking(market, "a")
        market.step()
    before = market.service["a"]
    for _ in range(600):
        keep_asking(market, "ac")
        market.step()
    assert market.service["c"] == pytest.approx(market.service["a"] - before, rel=0.1)


def test_a_tenant_of_tiny_weight_is_served():
    market = Market()
    small = [market.ask("small", 40, 10, weight=0.01) for _ in range(3)]
    for _ in range(4000):
        keep_asking(market, "abc")
        market.step()
        if all(told.ended for told in small):
            return
    raise AssertionError("it starves")


def simulate(flood, speed=1.0, steps=4000):
    """A steady tenant, at a tenth of what the machine could give it, and perhaps a flood."""
    market = Market(seqs=16, budget=128, blocks=3000, slots=24, speed=speed, check=False)
    random = Random(5)
    due, steady = 0.0, []
    for _ in range(steps):
        while flood and market.waiting("flood") < 40:
            size = random.randint(150, 450), random.randint(10, 60)
            market.ask("flood", *size, adapter=1000 + random.randrange(100))
        while due <= market.now:
            steady.append(market.ask("steady", 40, 30, adapter=random.randrange(4)))
            steady[-1].asked = due
            due += random.expovariate(1 / 4000)
        if market.scheduler.has_work:
            market.step()
        else:
            market.now = due
    done = [told for told in steady if told.ended]
    return market, np.array([t.ttft for t in done]), np.concatenate([t.gaps for t in done])


def test_a_flood_costs_a_steady_tenant_no_more_than_the_half_that_is_not_its_own():
    beside, ttft, gaps = simulate(flood=True)
    _, ttft_alone, gaps_alone = simulate(flood=False, speed=0.5)
    assert beside.service["flood"] > 5 * beside.service["steady"]
    assert len(ttft) > 80
    for percentile in (50, 90, 99):
        assert np.percentile(ttft, percentile) <= 1.3 * np.percentile(ttft_alone, percentile)
        assert np.percentile(gaps, percentile) <= 1.3 * np.percentile(gaps_alone, percentile)
    assert gaps.mean() <= 1.3 * gaps_alone.mean()


def test_full_seats_make_room_for_who_holds_less_than_its_share():
    market = Market(seqs=4)
    flood = [market.ask("flood", 8, 100) for _ in range(10)]
    market.step()
    assert market.running("flood") == 4
    first = market.ask("steady", 8, 4)
    assert first.sequence.request.request_id in market.step()
    assert flood[3].sequence.num_preemptions == 1
    market.ask("steady", 8, 4)
    market.ask("steady", 8, 4)
    market.step()
    assert (market.running("flood"), market.running("steady")) == (2, 2)
    for _ in range(1000):
        if market.scheduler.has_work:
            market.step()
    assert all(told.ended and len(told.tokens) == 100 for told in flood)


def test_a_full_cache_makes_room_and_nobody_loses_its_only_request():
    market = Market(blocks=40, block_size=4)
    flood = [market.ask("flood", 40, 10) for _ in range(3)]
    for _ in range(3):
        market.step()
    steady = market.ask("steady", 40, 10)
    market.step()
    assert steady.sequence.block_table
    assert [told.sequence.num_preemptions for told in flood] == [0, 0, 1]
    long = Market(blocks=40, block_size=4)
    only = long.ask("flood", 120, 10)
    for _ in range(3):
        long.step()
    long.ask("steady", 60, 10)
    long.step()
    assert only.sequence.num_preemptions == 0


def test_where_blocks_run_out_who_holds_the_most_gives_back():
    market = Market(blocks=34, block_size=4)
    steady = [market.ask("steady", 8, 30) for _ in range(2)]
    market.step()
    flood = [market.ask("flood", 20, 30) for _ in range(2)]
    for _ in range(30):
        market.step()
    assert market.scheduler.num_preemptions
    assert [told.sequence.num_preemptions for told in steady] == [0, 0]
    assert flood[0].sequence.num_preemptions == 0


def test_adapters_of_one_tenant_make_room_for_anothers():
    market = Market(slots=4)
    flood = [market.ask("flood", 4, 50, adapter=number) for number in range(100)]
    for _ in range(3):
        market.step()
    steady = market.ask("steady", 4, 5, adapter=1000)
    assert steady.sequence.request.request_id in market.step()
    assert [told.sequence.num_preemptions for told in flood[:4]] == [0, 0, 0, 1]


def test_a_flood_that_waits_for_adapters_holds_up_nobody_else():
    market = Market(slots=3)
    for number in range(100):
        market.ask("flood", 4, 200, adapter=number % 50)
    for _ in range(3):
        market.step()
    for number in range(80):  # more than may overtake a sequence of one tenant
        steady = market.ask("steady", 4, 2, adapter=1000)
        while not steady.ended:
            market.step()
        assert steady.ttft <= 4 * 100, number


def test_beams_that_go_on_together_leave_others_their_rows():
    market = Market(seqs=8, overhead=0)
    search = market.ask("search", 8, 60, beams=BeamSearch(6, 1.0, 1))
    steady = market.ask("steady", 8, 20)
    for _ in range(40):
        market.step()
    assert steady.ended
    assert not search.ended
    while market.scheduler.has_work:
        market.step()
    assert search.ended


def test_priority_and_deadline_order_within_a_tenant_alone():
    market = Market(seqs=1)
    late = market.ask("a", 4, 1)
    soon = market.ask("a", 4, 1, deadline=9.0)
    sooner = market.ask("a", 4, 1, deadline=8.0)
    urgent = market.ask("a", 4, 1, priority=-1)
    other = market.ask("b", 4, 1, priority=5)
    order = []
    while market.scheduler.has_work:
        order += market.step()
    names = [each.sequence.request.request_id for each in (urgent, other, sooner, soon, late)]
    assert order == names


def test_what_the_cache_holds_is_free_and_recomputing_is_not_charged():
    market = Market()
    first = market.ask("a", 40, 2)
    while market.scheduler.has_work:
        market.step()
    counter = market.scheduler._counters.counter("a")
    assert counter == 40 + 2
    first.sequence.num_preemptions = 0
    again = market.ask("a", 40, 2, weight=2.0)
    again.sequence.request.prompt_token_ids[:] = first.sequence.request.prompt_token_ids
    again.sequence.token_ids[:] = first.sequence.request.prompt_token_ids
    again.sequence.adapters = first.sequence.adapters
    market.step()
    market.scheduler._preempt(again.sequence)
    while market.scheduler.has_work:
        market.step()
    assert again.sequence.num_cached_tokens == 36
    assert market.scheduler._counters.counter("a") == counter + (4 + 2) / 2


def test_a_flood_that_fills_the_queue_leaves_others_their_share_of_it(tmp_path):
    async def ask():
        client = EngineClient(engine_config(tmp_path, max_num_seqs=4), max_waiting=16)
        client._send = lambda command: None  # there is no engine

        def admit(tenant, number):
            request = make_request(f"{tenant}-{number}", [1])
            client._admit(structs.replace(request, share=Share(tenant)))

        for number in range(20):
            admit("flood", number)
        with pytest.raises(QueueFull):
            admit("flood", 20)
        for number in range(10):
            admit("steady", number)
        for tenant in ("steady", "flood"):
            with pytest.raises(QueueFull):
                admit(tenant, 30)

    asyncio.run(ask())
