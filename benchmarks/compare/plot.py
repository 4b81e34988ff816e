"""A picture of a comparison: this server's rate over every other's. Needs matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

from ..errors import BenchmarkError
from .comparison import Comparison
from .report import ratios

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
"""Of Okabe and Ito's palette, which all can tell apart, and a grey."""
_MEASURE = "output_tokens_per_second"


def draw(comparison: Comparison, folder: Path) -> Path:
    """Write compare.png: a bar for each peer and scenario, from the least to the largest round.

    Raises:
        BenchmarkError: The file cannot be written.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    ours, *peers = comparison.systems
    width = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        for place, scenario in enumerate(comparison.scenarios):
            cells = comparison.cells
            found = ratios(
                cells[ours.name, scenario.name], cells[peer.name, scenario.name], _MEASURE
            )
            if found is not None:
                axes.bar(
                    place + (index - (len(peers) - 1) / 2) * width,
                    found.median,
                    width,
                    yerr=[[found.median - found.min], [found.max - found.median]],
                    color=_COLOURS[index % len(_COLOURS)],
                )
        axes.bar(0, 0, color=_COLOURS[index % len(_COLOURS)], label=peer.name)
    axes.axhline(1, color="#404040", linewidth=1)
    axes.set_xticks(range(len(comparison.scenarios)), [each.title for each in comparison.scenarios])
    axes.set_ylabel("output tokens/s, ours / theirs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path = folder / "compare.png"
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BenchmarkError(f"--plot {path}: {error.strerror}") from error
    return path
