"""Series by name: never more than so many, and every token counted in exactly one of them."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from deltamux.server.metrics.by_name import MAX_NAMES, OTHER, ByName
from deltamux.server.metrics.metrics import Metrics
from deltamux.server.metrics.request import Asked, RequestRecord
from deltamux.server.usage.counts import Consumer

LIMIT = 3
NAMES = [f"name-{number}" for number in range(12)]
REVIEW = None
USES = st.one_of(st.tuples(st.sampled_from(NAMES), st.integers(1, 500)), st.just(REVIEW))


def tokens(registry: CollectorRegistry) -> dict[str, float]:
    return {
        sample.labels["tenant"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "deltamux:tenant_generation_tokens_total"
    }


@settings(max_examples=60, deadline=None)
@given(uses=st.lists(USES, max_size=60))
def test_any_uses_in_any_order(uses):
    registry = CollectorRegistry()
    series = ByName("tenant", registry, LIMIT)
    used, counted, before = 0, 0.0, tokens(registry)
    for use in uses:
        if use is REVIEW:
            series.review()
        else:
            series.begun(use[0], 1, 0.1)
            series.generated(*use)
            used += use[1]
        now = tokens(registry)
        assert OTHER in now
        assert len(now) <= LIMIT + 1
        grown = {name: value - before.get(name, 0.0) for name, value in now.items()}
        assert min(grown.values()) >= 0, "a series went down"
        counted += sum(grown.values())
        before = now
    assert counted == used


def test_few_names_have_series_at_once():
    registry = CollectorRegistry()
    series = ByName("tenant", registry, LIMIT)
    for name in NAMES[:LIMIT]:
        series.generated(name, 1)
    assert tokens(registry) == {OTHER: 0, **dict.fromkeys(NAMES[:LIMIT], 1)}


def test_the_most_used_names_come_to_have_series():
    registry = CollectorRegistry()
    series = ByName("tenant", registry, LIMIT)
    weights = {name: 4**place for place, name in enumerate(NAMES)}
    for name, weight in weights.items():
        series.generated(name, weight)
    series.review()
    heaviest = sorted(weights, key=weights.__getitem__)[-LIMIT:]
    assert tokens(registry).keys() == {OTHER, *heaviest}
    series.generated(heaviest[0], 5)
    assert tokens(registry)[heaviest[0]] == 5


def test_names_that_are_about_equal_keep_what_they_have():
    registry = CollectorRegistry()
    series = ByName("tenant", registry, LIMIT)
    for turn in range(20):
        for place, name in enumerate(NAMES[: LIMIT + 1]):
            series.generated(name, 100 + 50 * ((place + turn) % 2))
        series.review()
        assert tokens(registry).keys() == {OTHER, *NAMES[:LIMIT]}


def test_what_is_remembered_is_bounded_too():
    series = ByName("tenant", CollectorRegistry(), LIMIT)
    for number in range(10_000):
        series.generated(f"passing-{number}", 3)
    series.review()
    assert isinstance(series._used, Counter)
    assert len(series._used) <= 10 * LIMIT


def test_a_server_shows_as_many_tenants_and_adapters_as_it_says():
    metrics = Metrics("base")
    asked = Asked("cmpl-1", "text_completion", False, 1, None, 1.0, 1.0)
    for number in range(2 * MAX_NAMES):
        consumer = Consumer("base", f"tenant-{number}", "key", f"adapter-{number}", "digest")
        with metrics.sequence(RequestRecord(consumer, asked), [], 3) as sequence:
            sequence.tokens(1, None)
            sequence.finish("length")
    for kind in ("tenant", "adapter"):
        found = [
            sample
            for family in metrics._registry.collect()
            for sample in family.samples
            if sample.name == f"deltamux:{kind}_requests_total"
        ]
        assert len(found) == MAX_NAMES + 1
        assert sum(sample.value for sample in found) == 2 * MAX_NAMES
