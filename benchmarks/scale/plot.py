"""A picture of overcommit: throughput and waits over live adapters. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from ..errors import BenchmarkError
from ..load.results import latencies
from .overcommit import LEAST_RATIO, Level, relative

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"
"""Of Okabe and Ito's palette, which all can tell apart, and a grey."""


def draw(levels: Sequence[Level], path: Path) -> None:
    """Write the PNG file.

    Raises:
        BenchmarkError: It cannot be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    times = [level.times for level in levels]
    left.plot(times, [relative(each, levels[0]) for each in levels], "o-", color=_BLUE)
    left.axhline(LEAST_RATIO, color=_GREY, linestyle="--", linewidth=1)
    left.set_ylim(bottom=0)
    left.set_ylabel("tokens/s over all resident")
    for level in levels:
        waits = latencies([each.ttft for each in level.records if each.error is None])
        for value, colour, label in ((waits.p50, _BLUE, "p50"), (waits.p99, _ORANGE, "p99")):
            mark = "" if level is levels[0] else "_"  # one entry in the legend
            right.plot(level.times, value, "o", color=colour, label=f"{mark}{label}")
    right.set_ylim(bottom=0)
    right.set_ylabel("wait for the first token, ms")
    right.legend(frameon=False)
    for axes in (left, right):
        _clean(axes, times)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BenchmarkError(f"--plot {path}: {error.strerror}") from error


def _clean(axes: Axes, times: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(times)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%gx"))
    axes.set_xlabel("live adapters over those that the device holds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E0E0E0", linewidth=0.7)
    axes.set_axisbelow(True)
