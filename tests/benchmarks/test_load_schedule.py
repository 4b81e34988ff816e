"""When the load generator sends what, as far as only options and the seed decide it."""

import math
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.benchmarks.errors import BenchmarkError
from deltamux.benchmarks.load.arrivals import Bursts, Closed, Gamma, parse_bursts
from deltamux.benchmarks.load.lengths import parse_lengths
from deltamux.benchmarks.load.popularity import draw_models, parse_popularity, shares
from deltamux.benchmarks.load.workload import Planned, Workload

MANY = 20_000
MODELS = tuple(f"a{i}" for i in range(8))
WORKLOAD = Workload(
    models=MODELS,
    base="base",
    load=Closed(4),
    requests=40,
    seconds=None,
    warmup=10,
    popularity=parse_popularity("zipf:1"),
    prompts=parse_lengths("", "uniform:1:9"),
    outputs=parse_lengths("", "lognormal:20:1"),
)

seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_gamma_distribution(burstiness: float) -> None:
    times = [0.0, *islice(Gamma(50, burstiness).times(7), MANY)]
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_poisson_process_has_as_much_variance_as_mean_in_a_second() -> None:
    times = np.array(list(islice(Gamma(20).times(3), MANY)))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(20, rel=0.03)
    assert counts.var() == pytest.approx(20, rel=0.15)


@given(st.floats(0.01, 1000), st.floats(0.05, 50), seeds)
def test_arrivals_never_go_back_and_are_the_same_for_a_seed(
    rate: float, burstiness: float, seed: int
) -> None:
    load = Gamma(rate, burstiness)
    times = list(islice(load.times(seed), 50))
    assert all(0 <= before <= after for before, after in pairwise(times))
    assert times == list(islice(load.times(seed), 50))
    assert times != list(islice(load.times(seed + 1), 50))


def test_bursts_come_at_once_and_in_time() -> None:
    assert list(islice(Bursts(3, 2.5).times(0), 7)) == [0, 0, 0, 2.5, 2.5, 2.5, 5]
    assert parse_bursts("3:2.5") == Bursts(3, 2.5)


@pytest.mark.parametrize("text", ["", "3", "3:", "0:1", "3:0", "3:nan", "3:inf", "a:b", "1.5:2"])
def test_bursts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="SIZE:SECONDS"):
        parse_bursts(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", {"a0": 1.0}),
        ("turns", dict.fromkeys(MODELS, 1 / 8)),
        ("uniform", dict.fromkeys(MODELS, 1 / 8)),
        ("zipf:0", dict.fromkeys(MODELS, 1 / 8)),
        ("zipf:1", {f"a{i}": 280 / 761 / (i + 1) for i in range(8)}),
        ("skewed:0.9:2", {"a0": 0.45, "a1": 0.45} | {f"a{i}": 0.1 / 6 for i in range(2, 8)}),
        ("half-base", {"base": 0.5} | dict.fromkeys(MODELS, 1 / 16)),
    ],
)
def test_traffic_is_shared_as_said(text: str, expected: dict[str, float]) -> None:
    popularity = parse_popularity(text)
    assert shares(popularity, MODELS, "base") == pytest.approx(expected)
    drawn = Counter(islice(draw_models(popularity, MODELS, "base", 5), MANY))
    assert drawn.keys() <= expected.keys()
    for name, share in expected.items():
        deviation = math.sqrt(share * (1 - share) * MANY)
        assert abs(drawn[name] - share * MANY) <= 4 * deviation, name


def test_turns_are_exact() -> None:
    drawn = draw_models(parse_popularity("turns"), MODELS[:3], None, 0)
    assert list(islice(drawn, 7)) == ["a0", "a1", "a2", "a0", "a1", "a2", "a0"]


@pytest.mark.parametrize(
    "text",
    ["", "two", "zipf", "zipf:", "zipf:-1", "zipf:nan", "skewed:0.9", "skewed:2:1", "skewed:1:0"],
)
def test_popularities_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="give one, turns"):
        parse_popularity(text)


@pytest.mark.parametrize(
    ("text", "models", "base", "message"),
    [
        ("skewed:0.5:8", MODELS, "base", "COUNT must be lower"),
        ("half-base", MODELS, None, "needs a base"),
        ("half-base", ("base",), "base", "adapters beside it"),
    ],
)
def test_too_few_models_are_refused_before_anything_is_sent(
    text: str, models: tuple[str, ...], base: str | None, message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        replace(WORKLOAD, models=models, base=base, popularity=parse_popularity(text))


def test_lengths_follow_their_distribution() -> None:
    uniform = Counter(islice(parse_lengths("", "uniform:3:7").draws("s"), MANY))
    assert sorted(uniform) == [3, 4, 5, 6, 7]
    assert all(abs(count - MANY / 5) < 4 * math.sqrt(MANY * 0.16) for count in uniform.values())
    draws = np.array(list(islice(parse_lengths("", "lognormal:400:0.7").draws("s"), MANY)))
    assert draws.mean() == pytest.approx(400, rel=0.02)
    assert np.median(draws) == pytest.approx(400 * math.exp(-(0.7**2) / 2), rel=0.03)
    assert np.log(draws).std() == pytest.approx(0.7, rel=0.03)


@given(st.integers(1, 500), st.integers(0, 500), st.floats(0.5, 1e4), st.floats(0, 5), seeds)
def test_clipped_lengths_stay_in_their_range(
    low: int, more: int, mean: float, sigma: float, seed: int
) -> None:
    lengths = parse_lengths("", f"lognormal:{mean}:{sigma}:{low}:{low + more}")
    draws = list(islice(lengths.draws(str(seed)), 20))
    assert all(isinstance(each, int) and low <= each <= low + more for each in draws)


@pytest.mark.parametrize("text", ["128", "uniform:3:9", "lognormal:200:0.5:1:2000"])
def test_lengths_are_told_as_they_are_given(text: str) -> None:
    assert str(parse_lengths("", text)) == text


def test_short_forms_of_lengths() -> None:
    assert str(parse_lengths("", "3:9")) == "uniform:3:9"
    assert str(parse_lengths("", "lognormal:200:0.5")) == "lognormal:200:0.5:1:2000"


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "9:3", "0:3", "1.5", "uniform:3", "normal:1:2"],
)
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"--output-tokens .*: give TOKENS"):
        parse_lengths("--output-tokens", text)


@pytest.mark.parametrize("text", ["3", "0:1", "5:-1", "nan:1", "inf:1", "5:nan", "5:1:9:3"])
def test_lognormals_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"--prompt-tokens lognormal:.*: give TOKENS"):
        parse_lengths("--prompt-tokens", f"lognormal:{text}")


def sent(workload: Workload) -> list[Planned]:
    return [*workload.warm_up(), *workload.planned()]


@settings(max_examples=20)
@given(seeds, st.sampled_from([Closed(3), Gamma(9.0, 0.5), Bursts(4, 1.0)]))
def test_a_seed_decides_every_request(seed: int, load: Closed | Gamma | Bursts) -> None:
    workload = replace(WORKLOAD, seed=seed, load=load, keys={"x": "1", "y": "2"})
    assert sent(workload) == sent(workload)
    assert len(sent(workload)) == 50
    other = replace(workload, seed=seed + 1)
    assert [each.request.prompt for each in sent(other)] != [
        each.request.prompt for each in sent(workload)
    ]


def test_what_one_part_draws_does_not_change_another() -> None:
    """So that two runs that differ in one option differ in nothing else."""
    more = replace(
        WORKLOAD,
        load=Gamma(5.0),
        outputs=parse_lengths("", "7"),
        keys={"x": "1", "y": "2"},
        requests=50,
    )
    for one, other in zip(WORKLOAD.planned(), more.planned(), strict=False):
        assert one.request.prompt == other.request.prompt
        assert one.request.model == other.request.model


def test_no_two_prompts_are_alike_without_a_prefix() -> None:
    workload = replace(WORKLOAD, prompts=parse_lengths("", "12"))
    prompts = [tuple(each.request.prompt) for each in sent(workload)]
    assert len(set(prompts)) == len(prompts) == 50
    assert {len(prompt) for prompt in prompts} == {12}
    assert all(1000 <= token <= 30000 for prompt in prompts for token in prompt)


def test_prefixes_are_shared_by_all_and_by_each_model() -> None:
    workload = replace(WORKLOAD, shared_prefix=5, adapter_prefix=4)
    prefixes: dict[str, set[tuple[int, ...]]] = {}
    for each in sent(workload):
        prompt = each.request.prompt
        assert each.prompt_tokens == len(prompt)
        assert 9 < len(prompt) <= 9 + 9
        prefixes.setdefault(each.request.model, set()).add(tuple(prompt[:9]))
    assert all(len(each) == 1 for each in prefixes.values())
    whole = {prefix for each in prefixes.values() for prefix in each}
    assert len({prefix[:5] for prefix in whole}) == 1
    assert len({prefix[5:] for prefix in whole}) == len(prefixes) > 1


def test_the_warm_up_reaches_every_model_and_the_base() -> None:
    workload = replace(WORKLOAD, popularity=parse_popularity("half-base"), warmup=9)
    assert {each.request.model for each in workload.warm_up()} == {"base", *MODELS}


def test_tenants_are_spread_over_models() -> None:
    workload = replace(
        WORKLOAD,
        models=MODELS[:2],
        popularity=parse_popularity("turns"),
        keys={"x": "kx", "y": "ky"},
        requests=200,
    )
    pairs = Counter((each.request.model, each.tenant) for each in workload.planned())
    assert len(pairs) == 4
    assert min(pairs.values()) > 25
    assert all(each.request.key == f"k{each.tenant}" for each in workload.planned())
    assert "kx" not in repr(list(workload.planned())) + repr(workload) + str(workload.describe())
