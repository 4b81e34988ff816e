"""The load generator's figures, of records written by hand, and what is told of them."""

import asyncio
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deltamux.benchmarks.errors import BenchmarkError
from deltamux.benchmarks.load import report
from deltamux.benchmarks.load.arrivals import Closed
from deltamux.benchmarks.load.lengths import Lengths
from deltamux.benchmarks.load.popularity import Popularity
from deltamux.benchmarks.load.progress import Progress, Tally
from deltamux.benchmarks.load.results import Objective, evaluate, latencies, parse_objective
from deltamux.benchmarks.load.run import Outcome, Record
from deltamux.benchmarks.load.workload import Workload

WORKLOAD = Workload(
    models=("a", "b"),
    base="base",
    load=Closed(4),
    requests=40,
    seconds=None,
    warmup=10,
    popularity=Popularity(),
    prompts=Lengths(8, 8),
    outputs=Lengths(4, 4),
)


def record(
    times: list[float], tokens: list[int], *, model: str = "a", sent: float = 0.0, **others: object
) -> Record:
    fields = {"tenant": None, "due": None, "ended": times[-1], "prompt_tokens": 10} | others
    return Record(model=model, sent=sent, times=np.array(times), tokens=np.array(tokens), **fields)


def failed(error: str, **others: object) -> Record:
    return replace(record([9.0], [3]), error=error, **others)


def outcome(*records: Record, seconds: float = 10.0, **others: object) -> Outcome:
    fields = {"cpu_seconds": 1.0, "warmup_errors": []} | others
    return Outcome(records=list(records), seconds=seconds, **fields)


FAST = record([1.1, 1.2, 1.4], [1, 1, 1], sent=1.0)
LUMPY = record([3.0, 3.3], [2, 3], sent=1.0, model="b", tenant="t")


def test_latencies_of_one_request() -> None:
    assert FAST.ttft == pytest.approx(0.1)
    assert FAST.e2e == pytest.approx(0.4)
    assert FAST.tpot == pytest.approx(0.15)
    assert FAST.gaps() == pytest.approx([0.1, 0.2])


def test_tokens_of_one_chunk_share_the_gap_before_it() -> None:
    assert LUMPY.gaps() == pytest.approx([0.1, 0.1, 0.1])
    assert LUMPY.tpot == pytest.approx(0.1)
    assert LUMPY.output_tokens == 5


def test_a_run_is_counted_over_its_whole_time() -> None:
    results = evaluate(outcome(FAST, LUMPY, failed("HTTP 429: busy")), Objective())
    total = results.total
    assert (total.completed, total.failed, results.failures) == (2, 1, {"HTTP 429: busy": 1})
    assert (total.output_tokens, total.prompt_tokens) == (8, 20)
    assert total.requests_per_second == 0.2
    assert total.output_tokens_per_second == 0.8
    assert total.total_tokens_per_second == 2.8
    assert total.ttft_ms.max == pytest.approx(2000)
    assert total.itl_ms.p50 == pytest.approx(100)
    assert total.goodput is None
    assert results.generator.cpu_us_per_token == pytest.approx(1e6 / 11, abs=0.1)


def test_figures_by_adapter_and_by_tenant_add_up() -> None:
    results = evaluate(outcome(FAST, FAST, LUMPY, failed("x", model="b")), Objective())
    assert list(results.adapters) == ["a", "b"]
    assert [each.completed for each in results.adapters.values()] == [2, 1]
    assert [each.failed for each in results.adapters.values()] == [0, 1]
    assert sum(each.output_tokens for each in results.adapters.values()) == 11
    assert list(results.tenants) == ["t"]
    assert results.tenants["t"].output_tokens == 5


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("ttft=100.001", 1),
        ("ttft=2000.001", 2),
        ("itl=150", 1),  # every gap: the fast one's second is 200 ms
        ("tpot=150.001", 2),  # their mean
        ("tpot=120", 1),
        ("e2e=400.001", 1),
        ("ttft=100.001,itl=150", 0),
        ("ttft=9999,itl=9999,tpot=9999,e2e=9999", 2),
    ],
)
def test_a_good_request_keeps_all_bounds(text: str, good: int) -> None:
    results = evaluate(outcome(FAST, LUMPY, failed("x"), failed("y")), parse_objective(text))
    assert results.total.goodput.share == good / 4
    assert results.total.goodput.requests_per_second == good / 10


@pytest.mark.parametrize("text", ["", "ttft", "ttft=", "ttft=0", "x=1", "ttft=1,ttft=2", "itl=nan"])
def test_bounds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="--slo"):
        parse_objective(text)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_percentiles_are_values_with_so_many_at_or_below(values: list[float]) -> None:
    figures = latencies(values)
    ordered = sorted(values)
    for percent, value in ((50, figures.p50), (90, figures.p90), (99, figures.p99)):
        rank = math.ceil(percent * len(values) / 100)
        assert value == pytest.approx(1000 * ordered[rank - 1], abs=1e-3)
    assert figures.max == pytest.approx(1000 * ordered[-1], abs=1e-3)


def test_nothing_has_no_latencies() -> None:
    results = evaluate(outcome(failed("x")), Objective())
    assert results.total.ttft_ms.p99 is results.total.itl_ms.mean is None
    assert "| to the first token (TTFT)            |    - |" in report.text(WORKLOAD, results, 5)


def test_single_tokens_have_no_gaps() -> None:
    results = evaluate(outcome(record([1.0], [1]), record([2.0], [1])), Objective({"itl": 1.0}))
    assert results.total.itl_ms.p50 is results.total.tpot_ms.p50 is None
    assert results.total.goodput.share == 1


def test_the_text_bounds_its_tables_and_says_so() -> None:
    records = [record([1.0], [1], model=f"a{i}", tenant=f"t{i}") for i in range(7)]
    results = evaluate(outcome(*records, FAST, FAST), parse_objective("ttft=500"))
    text = report.text(WORKLOAD, results, 3)
    assert "5 more adapters: see the JSON" in text
    assert "4 more tenants: see the JSON" in text
    assert text.index("| a  ") < text.index("| a0 ")
    assert "Within ttft 500 ms: 22.2% of the requests, 0.20 good requests/s" in text


def test_warnings_count_the_reasons() -> None:
    errors = [failed("often")] * 3 + [failed(f"reason {i}") for i in range(11)]
    results = evaluate(outcome(*errors, warmup_errors=["cold", "cold"]), Objective())
    lines = list(report.warnings(results))
    assert lines[0] == "3 failed: often"
    assert "2 failed: other reasons" in lines
    assert "2 failed in the warm-up: cold" in lines


def test_one_is_warned_of_a_slow_generator() -> None:
    late = [replace(FAST, due=0.95) for _ in range(100)]
    [line] = report.warnings(evaluate(outcome(*late), Objective()))
    assert "could not keep up" in line
    assert "50 ms late" in line
    [line] = report.warnings(evaluate(outcome(FAST, cpu_seconds=9.0), Objective()))
    assert "90% of a core" in line
    assert list(report.warnings(evaluate(outcome(FAST), Objective()))) == []


def test_one_is_warned_of_prompts_of_unknown_length() -> None:
    results = evaluate(outcome(record([1.0], [1], prompt_tokens=None)), Objective())
    [line] = report.warnings(results)
    assert "lack the prompts of 1 requests" in line


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_in_a_file(terminal: bool) -> None:
    file = io.StringIO()
    tally = Tally("measure", 8, None, sent=6, done=4, failed=1, tokens=50)
    for seconds in (0.3, 0.1, 0.2):
        tally.add_ttft(seconds)

    async def show() -> None:
        async with Progress(tally, Console(file=file, force_terminal=terminal, width=120)):
            pass

    asyncio.run(show())
    line = file.getvalue()
    assert "4/8 done, 2 running, 1 failed, " in line
    assert "tokens/s, TTFT p50 200 ms" in line
    assert ("\x1b" in line) is terminal


def test_progress_is_that_of_the_nearer_bound() -> None:
    assert Tally("x", 10, 4.0, done=5).fraction(1.0) == 0.5
    assert Tally("x", None, 4.0, done=5).fraction(3.0) == 0.75
    assert Tally("x", 10, None, done=10).fraction(9.0) == 1.0
