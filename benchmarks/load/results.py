"""The figures of a run."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BenchmarkError
from .run import Outcome, Record

LATENCIES = ("ttft", "itl", "tpot", "e2e")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Objective:
    """Bounds in milliseconds that a good request keeps.

    Of ``itl`` every gap must keep it, of ``tpot`` the request's mean.
    """

    bounds: Mapping[str, float] = field(default_factory=dict)

    def met(self, record: Record) -> bool:
        """Whether the request succeeded within all bounds."""
        if record.error is not None:
            return False
        values = {
            "ttft": record.ttft,
            "itl": float(record.gaps().max(initial=0.0)),
            "tpot": record.tpot,
            "e2e": record.e2e,
        }
        return all(1000 * values[name] <= bound for name, bound in self.bounds.items())


def parse_objective(text: str) -> Objective:
    """Of ``ttft=500,itl=50,...``.

    Raises:
        BenchmarkError: It is not that.
    """
    bounds: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, value = part.split("=")
            if name not in LATENCIES or name in bounds or not float(value) > 0:
                raise ValueError
            bounds[name] = float(value)
    except ValueError as error:
        raise BenchmarkError(
            f"--slo {text}: give NAME=MILLISECONDS separated by commas, with NAME one of"
            f" {', '.join(LATENCIES)}"
        ) from error
    return Objective(bounds)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds; None of nothing. Percentiles are values that were measured (nearest rank)."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests within all bounds."""

    share: float
    requests_per_second: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a run, or of the requests of one model or tenant in it.

    Rates are over the whole run. Latencies and tokens are those of completed requests.

    Attributes:
        prompt_tokens: Where they are known; ``prompts_unknown`` requests have none.
        goodput: None without an objective.
    """

    completed: int
    failed: int
    output_tokens: int
    prompt_tokens: int
    prompts_unknown: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft_ms: Latencies
    itl_ms: Latencies
    tpot_ms: Latencies
    e2e_ms: Latencies
    goodput: Goodput | None


@dataclass(frozen=True, slots=True)
class Generator:
    """What the load generator itself took.

    Attributes:
        cpu_share: Of one core, on average.
        late_ms: How long after they were due requests were sent; None in a closed loop.
    """

    cpu_seconds: float
    cpu_share: float
    cpu_us_per_token: float | None
    late_ms: Latencies | None


@dataclass(frozen=True, slots=True)
class Results:
    """All of a run.

    Attributes:
        seconds: To the end of the last request.
        failures: How many requests failed for which reason.
        warmup_failures: The same of the warm-up, which nothing else here counts.
        slo_ms: The bounds of the goodput.
    """

    seconds: float
    total: Figures
    adapters: Mapping[str, Figures]
    tenants: Mapping[str, Figures]
    failures: Mapping[str, int]
    warmup_failures: Mapping[str, int]
    slo_ms: Mapping[str, float]
    generator: Generator


def evaluate(outcome: Outcome, objective: Objective) -> Results:
    """The figures of a run."""
    records, seconds = outcome.records, outcome.seconds

    def figures(records: Sequence[Record]) -> Figures:
        return summarize(records, seconds, objective)

    def by(key: Callable[[Record], str | None]) -> dict[str, Figures]:
        return {name: figures(group) for name, group in _groups(records, key).items()}

    return Results(
        seconds=round(seconds, 3),
        total=figures(records),
        adapters=by(lambda record: record.model),
        tenants=by(lambda record: record.tenant),
        failures=_count(record.error for record in records if record.error),
        warmup_failures=_count(outcome.warmup_errors),
        slo_ms=objective.bounds,
        generator=_generator(outcome),
    )


def summarize(records: Sequence[Record], seconds: float, objective: Objective) -> Figures:
    """The figures of some requests of a run that took so long."""
    good = [record for record in records if record.error is None]
    output = sum(record.output_tokens for record in good)
    prompt = sum(record.prompt_tokens or 0 for record in good)
    return Figures(
        completed=len(good),
        failed=len(records) - len(good),
        output_tokens=output,
        prompt_tokens=prompt,
        prompts_unknown=sum(record.prompt_tokens is None for record in good),
        requests_per_second=round(len(good) / seconds, 3),
        output_tokens_per_second=round(output / seconds, 2),
        total_tokens_per_second=round((output + prompt) / seconds, 2),
        ttft_ms=latencies([record.ttft for record in good]),
        itl_ms=latencies(np.concatenate([record.gaps() for record in good] or [np.empty(0)])),
        tpot_ms=latencies([record.tpot for record in good if len(record.times) > 1]),
        e2e_ms=latencies([record.e2e for record in good]),
        goodput=_goodput(records, seconds, objective),
    )


def latencies(seconds: ArrayLike) -> Latencies:
    """Of values in seconds."""
    values = 1000 * np.asarray(seconds, dtype=np.float64)
    if not values.size:
        return Latencies(None, None, None, None, None)
    points = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return Latencies(*(round(float(each), 3) for each in (values.mean(), *points, values.max())))


def _goodput(records: Sequence[Record], seconds: float, objective: Objective) -> Goodput | None:
    if not objective.bounds or not records:
        return None
    good = sum(map(objective.met, records))
    return Goodput(round(good / len(records), 4), round(good / seconds, 3))


def _generator(outcome: Outcome) -> Generator:
    late = [record.sent - record.due for record in outcome.records if record.due is not None]
    tokens = sum(record.output_tokens for record in outcome.records)
    return Generator(
        cpu_seconds=round(outcome.cpu_seconds, 3),
        cpu_share=round(outcome.cpu_seconds / outcome.seconds, 3),
        cpu_us_per_token=round(1e6 * outcome.cpu_seconds / tokens, 1) if tokens else None,
        late_ms=latencies(late) if late else None,
    )


def _groups(
    records: Sequence[Record], key: Callable[[Record], str | None]
) -> Mapping[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        if (name := key(record)) is not None:
            groups.setdefault(name, []).append(record)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def _count(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons).most_common())
