"""The figures for a reader. The JSON beside them has all that these tables leave out."""

from collections.abc import Iterator, Mapping
from dataclasses import astuple
from itertools import islice

from ..markdown import table
from .results import LATENCIES, Figures, Latencies, Results
from .workload import Workload

_NAMES = {
    "ttft": "to the first token (TTFT)",
    "itl": "between tokens (ITL)",
    "tpot": "per output token of a request (TPOT)",
    "e2e": "whole request (E2E)",
}
_LATE_MS, _BUSY = 20.0, 0.85
"""Lateness of one request in a hundred, and share of a core, above which figures are doubtful."""
_REASONS = 10


def text(workload: Workload, results: Results, top: int) -> str:
    """Paragraphs and tables; ``top`` bounds the adapters' and the tenants'."""
    parts = [title(workload), _rates(results), _latencies(results.total)]
    parts += list(_goodput(results))
    if len(results.adapters) > 1:
        parts += _table("adapter", results.adapters, top)
    if results.tenants:
        parts += _table("tenant", results.tenants, top)
    return "\n\n".join([*parts, _generator(results)])


def warnings(results: Results) -> Iterator[str]:
    """What one should know before believing the figures; failures first."""
    for phase, failures in (
        ("failed", results.failures),
        ("failed in the warm-up", results.warmup_failures),
    ):
        for reason, count in islice(failures.items(), _REASONS):
            yield f"{count} {phase}: {reason}"
        if len(failures) > _REASONS:
            yield f"{sum(islice(failures.values(), _REASONS, None))} {phase}: other reasons"
    late = results.generator.late_ms
    if late is not None and late.p99 is not None and late.p99 > _LATE_MS:
        yield (
            f"the load generator could not keep up: one request in a hundred was sent"
            f" {late.p99:,.0f} ms late or more, and the latencies do not count that time"
        )
    if results.generator.cpu_share > _BUSY:
        yield (
            f"the load generator took {results.generator.cpu_share:.0%} of a core and may have"
            " been the bottleneck"
        )
    if results.total.prompts_unknown:
        yield (
            f"tokens/s in all lack the prompts of {results.total.prompts_unknown} requests:"
            " the server tells no usage"
        )


def title(workload: Workload) -> str:
    """The workload in a line."""
    said = workload.describe()
    models = f"{len(workload.models)} model{'s' if len(workload.models) != 1 else ''}"
    popularity = "as in the trace" if workload.popularity is None else f"{workload.popularity}"
    return (
        f"{str(workload.load).capitalize()}; {models}, popularity {popularity};"
        f" prompt tokens {said['prompt_tokens']}, output tokens {said['output_tokens']};"
        f" seed {workload.seed}"
    )


def _rates(results: Results) -> str:
    total = results.total
    return (
        f"{total.completed:,} requests in {results.seconds:,.1f} s, {total.failed:,} failed:"
        f" {total.requests_per_second:,.2f} requests/s,"
        f" {total.output_tokens_per_second:,.1f} output tokens/s,"
        f" {total.total_tokens_per_second:,.1f} tokens/s with prompts"
    )


def _latencies(total: Figures) -> str:
    rows = [[_NAMES[name], *map(_number, astuple(_latency(total, name)))] for name in LATENCIES]
    return table(("ms", "mean", "p50", "p90", "p99", "max"), rows)


def _goodput(results: Results) -> Iterator[str]:
    good = results.total.goodput
    if good is not None:
        bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in results.slo_ms.items())
        yield (
            f"Within {bounds}: {good.share:.1%} of the requests,"
            f" {good.requests_per_second:,.2f} good requests/s"
        )


def _table(what: str, groups: Mapping[str, Figures], top: int) -> list[str]:
    head = [what, "requests", "failed", "tokens/s"]
    head += ["TTFT p50", "p99", "ITL p50", "p99", "E2E p50", "p99"]
    scored = any(each.goodput for each in groups.values())
    rows = [_row(name, figures) for name, figures in islice(groups.items(), top)]
    lines = table([*head, "good"] if scored else head, rows)
    more = len(groups) - len(rows)
    return [f"{lines}\n\n{more} more {what}s: see the JSON" if more > 0 else lines]


def _row(name: str, figures: Figures) -> list[str]:
    counts = [f"{figures.completed + figures.failed:,}", f"{figures.failed:,}"]
    points = [
        point
        for each in (figures.ttft_ms, figures.itl_ms, figures.e2e_ms)
        for point in (each.p50, each.p99)
    ]
    good = [] if figures.goodput is None else [f"{figures.goodput.share:.1%}"]
    rate = f"{figures.output_tokens_per_second:,.1f}"
    return [name, *counts, rate, *map(_number, points), *good]


def _generator(results: Results) -> str:
    generator = results.generator
    cost = (
        "" if generator.cpu_us_per_token is None else f", {generator.cpu_us_per_token:g} µs/token"
    )
    late = generator.late_ms
    lateness = (
        ""
        if late is None
        else f"; requests were sent {_number(late.p50)} ms (p50), {_number(late.p99)} ms (p99)"
        f" and {_number(late.max)} ms (max) after they were due"
    )
    return f"The load generator took {generator.cpu_share:.1%} of a core{cost}{lateness}"


def _latency(figures: Figures, name: str) -> Latencies:
    return {
        "ttft": figures.ttft_ms,
        "itl": figures.itl_ms,
        "tpot": figures.tpot_ms,
        "e2e": figures.e2e_ms,
    }[name]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
