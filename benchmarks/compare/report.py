"""What was found, for readers: tables, ratios, and the line of JSON."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median

from ..load.results import Figures
from ..markdown import table
from .comparison import Cell, Comparison
from .scenarios import Scenario

Value = Callable[[Figures], float | None]
MEASURES: Mapping[str, Value] = {
    "output_tokens_per_second": lambda figures: figures.output_tokens_per_second,
    "ttft_p50_ms": lambda figures: figures.ttft_ms.p50,
    "itl_p50_ms": lambda figures: figures.itl_ms.p50,
}
_HEADER = (
    *("system", "tokens/s", "TTFT p50, ms", "ITL p50, ms"),
    *("tokens/s: ours / theirs", "TTFT: ours / theirs", "ITL: ours / theirs"),
)
_NONE = "-"
_ADAPTER = re.compile(r"lora-\d\d")


@dataclass(frozen=True, slots=True)
class Spread:
    """Values of all rounds."""

    min: float
    median: float
    max: float


def spread(values: Sequence[float]) -> Spread | None:
    """Of values; None of none."""
    if not values:
        return None
    return Spread(*(round(each, 4) for each in (min(values), median(values), max(values))))


def values(cell: Cell, measure: str) -> Spread | None:
    """A measure over the rounds of a system."""
    found = [MEASURES[measure](figures) for figures in cell.rounds.values()]
    return spread([value for value in found if value is not None])


def ratios(ours: Cell, theirs: Cell, measure: str) -> Spread | None:
    """Ours over theirs, each within a round; None if no round has both."""
    value = MEASURES[measure]
    pairs = [
        (value(ours.rounds[number]), value(theirs.rounds[number]))
        for number in sorted(ours.rounds.keys() & theirs.rounds.keys())
    ]
    return spread([our / their for our, their in pairs if our is not None and their])


def text(comparison: Comparison) -> str:
    """A table for each scenario, then why some have no figures, and how well answers matched."""
    parts = [_table(comparison, scenario) for scenario in comparison.scenarios]
    reasons = list(_reasons(comparison))
    if reasons:
        parts.append("Without figures:\n\n" + "\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join([*parts, _checks(comparison), _settings(comparison)])


def document(comparison: Comparison) -> dict[str, object]:
    """For the line of JSON: by scenario and system."""
    return {
        scenario.name: {
            peer.name: _cell(comparison, scenario, peer.name) for peer in comparison.systems
        }
        for scenario in comparison.scenarios
    }


def _cell(comparison: Comparison, scenario: Scenario, name: str) -> dict[str, object]:
    ours, cell = _ours(comparison, scenario), comparison.cells[name, scenario.name]
    return {
        "reason": cell.reason,
        "answers": cell.finding and asdict(cell.finding),
        "rounds": {str(number): asdict(figures) for number, figures in cell.rounds.items()},
        "spread": {measure: _dict(values(cell, measure)) for measure in MEASURES},
        "ours_over_this": {measure: _dict(ratios(ours, cell, measure)) for measure in MEASURES},
    }


def _dict(found: Spread | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)


def _ours(comparison: Comparison, scenario: Scenario) -> Cell:
    return comparison.cells[comparison.systems[0].name, scenario.name]


def _table(comparison: Comparison, scenario: Scenario) -> str:
    ours = _ours(comparison, scenario)
    rows = []
    for peer in comparison.systems:
        cell = comparison.cells[peer.name, scenario.name]
        if cell.reason is None or not cell.reason.startswith("not offered"):
            rows.append((peer.name, *_figures(cell), *_ratios(ours, cell)))
    return f"{scenario.title}\n\n{table(_HEADER, rows)}"


def _figures(cell: Cell) -> list[str]:
    if cell.reason is not None:
        return [cell.reason.partition(":")[0], _NONE, _NONE]
    return [_number(values(cell, measure)) for measure in MEASURES]


def _ratios(ours: Cell, cell: Cell) -> list[str]:
    if cell is ours:
        return [_NONE] * len(MEASURES)
    return [_range(ratios(ours, cell, measure)) for measure in MEASURES]


def _number(found: Spread | None) -> str:
    return _NONE if found is None else f"{found.median:,.1f}"


def _range(found: Spread | None) -> str:
    if found is None:
        return _NONE
    return f"{found.median:.2f} ({found.min:.2f} to {found.max:.2f})"


def _reasons(comparison: Comparison) -> Iterator[str]:
    """A line for each reason, with all scenarios it holds for."""
    titles: dict[tuple[str, str], list[str]] = {}
    for (name, scenario), cell in comparison.cells.items():
        if cell.reason is not None:
            titles.setdefault((name, cell.reason), []).append(scenario)
    for (name, reason), scenarios in titles.items():
        yield f"{name} ({', '.join(scenarios)}): {reason}"


def _checks(comparison: Comparison) -> str:
    rows = [
        (name, scenario, *map(_gap, (finding.mean_gap, finding.worst_gap, finding.rival_gap)))
        for (name, scenario), cell in comparison.cells.items()
        if (finding := cell.finding) is not None
    ]
    header = ("system", "scenario", "mean gap, nats", "worst token's", "least as another model")
    return (
        "Answers, read by transformers and PEFT in float32: how much less likely their tokens are"
        f" than the best ones\n\n{table(header, rows)}"
    )


def _gap(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _settings(comparison: Comparison) -> str:
    lines = []
    for peer in comparison.systems:
        if peer.name in comparison.versions:
            versions = ", ".join(f"{n} {v}" for n, v in comparison.versions[peer.name].items())
            settings = comparison.settings[peer.name].items()
            told = "; ".join(f"{name}: {_shown(value)}" for name, value in settings)
            lines.append(f"- {peer.name}: {peer.about}. {versions}. {told}")
    return "Systems:\n\n" + "\n".join(lines)


def _shown(value: object) -> str:
    """A command without its long list of adapters, which the JSON has."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    words = [str(word) for word in value if not _ADAPTER.search(str(word))]
    return " ".join(word for word, _ in groupby(words))
