"""What a scenario found: figures, and the bars they are held to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..load.results import LATENCIES, Objective, summarize
from ..load.run import Outcome, Record


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and what it should be.

    Attributes:
        what: The figure, in words.
        value: That was measured; None where nothing could be.
        bound: That it is held to.
        at_least: Whether it should not be lower; else not higher.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is as good as the bound."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def document(self) -> dict[str, object]:
        """For the JSON line."""
        relation = "at least" if self.at_least else "at most"
        return {"what": self.what, "value": self.value, relation: self.bound, "met": self.met}


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one scenario.

    Attributes:
        figures: As they stand in the JSON line.
        bars: What is held to a bar.
        faults: What went wrong: requests that failed, or were answered wrongly.
    """

    figures: Mapping[str, object]
    bars: tuple[Bar, ...]
    faults: tuple[str, ...] = ()


def rate(outcome: Outcome) -> float:
    """Output tokens per second of a run."""
    return summarize(outcome.records, outcome.seconds, Objective()).output_tokens_per_second


def brief(outcome: Outcome) -> dict[str, object]:
    """The figures of a run that a report keeps."""
    total = summarize(outcome.records, outcome.seconds, Objective())
    milliseconds = {name: getattr(total, f"{name}_ms") for name in LATENCIES}
    return {
        "seconds": round(outcome.seconds, 2),
        "completed": total.completed,
        "failed": total.failed,
        "adapters": len({record.model for record in outcome.records}),
        "output_tokens_per_second": total.output_tokens_per_second,
        **{f"{name}_p50_ms": each.p50 for name, each in milliseconds.items()},
        **{f"{name}_p99_ms": each.p99 for name, each in milliseconds.items()},
        "ttft_max_ms": total.ttft_ms.max,
    }


def faults(what: str, records: Sequence[Record]) -> list[str]:
    """A line for the requests that failed, if any did."""
    failed = [record for record in records if record.error is not None]
    if not failed:
        return []
    return [f"{what}: {len(failed)} of {len(records)} requests failed: {failed[0].error}"]
