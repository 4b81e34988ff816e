"""Pictures of a run. Needs matplotlib, which no other file here imports."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from ..errors import BenchmarkError
from .run import Outcome, Record

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
"""Of Okabe and Ito's palette, which all can tell apart."""
_ADAPTERS = 20
_DPI = 150
_BINS, _TITLE_COLUMNS = 80, 140
Floats = NDArray[np.float64]


def draw(outcome: Outcome, title: str, prefix: Path) -> list[Path]:
    """Write PREFIX-latency.png, PREFIX-throughput.png and PREFIX-adapters.png; nothing of nothing.

    Raises:
        BenchmarkError: A file cannot be written.
    """
    good = [record for record in outcome.records if record.error is None]
    if not good:
        return []
    figures = {
        "latency": _latency(good),
        "throughput": _throughput(outcome, good),
        "adapters": _adapters(good),
    }
    return [_save(figure, title, prefix, name) for name, figure in figures.items()]


def _save(figure: Figure, title: str, prefix: Path, name: str) -> Path:
    path = prefix.with_name(f"{prefix.name}-{name}.png")
    figure.suptitle(textwrap.fill(title, _TITLE_COLUMNS), fontsize=9, color="#404040")
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise BenchmarkError(f"--plot {path}: {error.strerror}") from error
    return path


def _latency(good: Sequence[Record]) -> Figure:
    """How many requests, or tokens, took at most how long."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    _cdf(panels[0], "Time to the first token", "requests", np.array([each.ttft for each in good]))
    _cdf(panels[1], "Time between tokens", "tokens", np.concatenate([each.gaps() for each in good]))
    _cdf(panels[2], "Time of a whole request", "requests", np.array([each.e2e for each in good]))
    panels[0].set_ylabel("took at most this long")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _cdf(axes: Axes, title: str, what: str, seconds: Floats) -> None:
    axes.set_title(f"{title} ({seconds.size:,} {what})", fontsize=10)
    _clean(axes)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("ms")
    if not seconds.size:
        return
    values = np.sort(seconds) * 1000
    axes.ecdf(values, color=_BLUE, linewidth=2)
    points = np.percentile(values, (50, 99), method="inverted_cdf")
    for point, percent, style in zip(points, (50, 99), ("--", ":"), strict=True):
        label = f"p{percent}  {point:,.4g} ms"
        axes.axvline(point, color=_ORANGE, linestyle=style, linewidth=1.4, label=label)
    _scale(axes, values)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)


def _scale(axes: Axes, values: Floats) -> None:
    """From zero, unless the slowest would leave nothing to see of the others."""
    low, high = np.percentile(values, (1, 50))
    if values[-1] > 20 * high and low > 0:
        axes.set_xscale("log")
        axes.set_xlim(left=low / 1.5)
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _throughput(outcome: Outcome, good: Sequence[Record]) -> Figure:
    """Tokens/s above, requests in flight below, over the seconds of the run."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    edges = np.linspace(0, outcome.seconds, _bins(outcome.seconds) + 1)
    times = np.concatenate([record.times for record in good])
    tokens = np.concatenate([record.tokens for record in good])
    rates = np.histogram(times, edges, weights=tokens)[0] / np.diff(edges)
    above.stairs(rates, edges, fill=True, color=_BLUE, alpha=0.25)
    above.stairs(rates, edges, baseline=None, color=_BLUE, linewidth=1.6)
    mean = tokens.sum() / outcome.seconds
    above.axhline(mean, color=_ORANGE, linestyle="--", linewidth=1.4)
    above.set_title(f"mean {mean:,.4g} tokens/s (dashed)", fontsize=10, loc="right", color=_ORANGE)
    above.set_ylabel("output tokens/s")
    below.step(*_running(outcome.records), where="post", color=_GREEN, linewidth=1.6)
    below.set_ylabel("requests running")
    below.set_xlabel("seconds since the start")
    for axes in (above, below):
        _clean(axes)
        axes.set_ylim(bottom=0)
    below.set_xlim(0, outcome.seconds)
    return figure


def _bins(seconds: float) -> int:
    """Of a second or a round part or multiple of it, not more than fit the picture."""
    widths = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600)
    width = next((each for each in widths if seconds / each <= _BINS), seconds / _BINS)
    return max(1, round(seconds / width))


def _running(records: Sequence[Record]) -> tuple[Floats, Floats]:
    """Times at which the number of requests in flight changed, and the number from then on."""
    sent, ended = [record.sent for record in records], [record.ended for record in records]
    times = np.array([0.0, *sent, *ended])
    changes = np.array([0.0] + [1.0] * len(sent) + [-1.0] * len(ended))
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(changes[order])


def _adapters(good: Sequence[Record]) -> Figure:
    """Spread of the times to the first token, a line for each of the busiest models."""
    groups: dict[str, list[float]] = {}
    for record in good:
        groups.setdefault(record.model, []).append(1000 * record.ttft)
    busiest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:_ADAPTERS]
    figure = Figure(figsize=(10, 1.8 + 0.28 * len(busiest)), layout="constrained")
    axes = figure.subplots()
    for index, (_, values) in enumerate(busiest):
        _interval(axes, index, np.array(values), labelled=index == 0)
    axes.set_yticks(range(len(busiest)), [f"{_short(name)}  ({len(v):,})" for name, v in busiest])
    axes.invert_yaxis()
    _clean(axes, "x")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlabel("ms to the first token")
    more = f", the {len(busiest)} busiest of {len(groups)}" if len(groups) > len(busiest) else ""
    axes.set_title(f"Time to the first token by model (requests){more}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _interval(axes: Axes, row: int, values: Floats, *, labelled: bool) -> None:
    low, quarter, half, three, high = np.percentile(values, (0, 25, 50, 75, 99))
    # A label that starts with an underscore is not shown in the legend.
    mark = "" if labelled else "_"
    axes.hlines(row, low, high, color=_GREY, linewidth=1.5, label=f"{mark}least to p99")
    axes.hlines(row, quarter, three, color=_BLUE, linewidth=6, label=f"{mark}middle half")
    axes.plot(
        half,
        row,
        "o",
        color="white",
        markeredgecolor=_ORANGE,
        markeredgewidth=2,
        markersize=7,
        label=f"{mark}p50",
    )


def _short(name: str) -> str:
    """At most 32 characters; names of a family differ at the end."""
    return name if len(name) <= 32 else f"{name[:14]}…{name[-17:]}"


def _clean(axes: Axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "both", color="#E0E0E0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
