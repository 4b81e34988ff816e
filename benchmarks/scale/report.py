"""What was found, for a reader and for the JSON line."""

from collections.abc import Iterator, Mapping

from ..markdown import table
from .findings import Bar, Finding


def document(findings: Mapping[str, Finding]) -> dict[str, object]:
    """Figures and bars by scenario."""
    return {
        name: {**finding.figures, "bars": [bar.document() for bar in finding.bars]}
        for name, finding in findings.items()
    }


def text(findings: Mapping[str, Finding]) -> str:
    """The bars, and under them the levels of overcommit if they were measured."""
    rows = [_row(name, bar) for name, finding in findings.items() for bar in finding.bars]
    parts = [table(("scenario", "figure", "value", "bar", "met"), rows)]
    if "overcommit" in findings:
        parts.append(_levels(findings["overcommit"]))
    return "\n\n".join(parts)


def faults(findings: Mapping[str, Finding]) -> Iterator[str]:
    """Requests that failed or were answered wrongly."""
    for name, finding in findings.items():
        yield from (f"{name}: {fault}" for fault in finding.faults)


def _row(name: str, bar: Bar) -> list[str]:
    value = "-" if bar.value is None else f"{bar.value:,.10g}"
    sign = ">=" if bar.at_least else "<="
    return [name, bar.what, value, f"{sign} {bar.bound:,.10g}", "yes" if bar.met else "NO"]


def _levels(finding: Finding) -> str:
    head = (
        "live over held",
        "adapters",
        "tokens/s over resident",
        "wait p50, ms",
        "p99, ms",
        "max, ms",
    )
    levels = finding.figures["levels"]
    assert isinstance(levels, list)
    rows = [
        [
            f"{each['times']:g}",
            f"{each['live']:,}",
            f"{each['ratio']:.2f}",
            *(f"{each[f'wait_{point}_ms']:,.0f}" for point in ("p50", "p99", "max")),
        ]
        for each in levels
    ]
    return table(head, rows)
