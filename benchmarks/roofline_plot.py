"""Draws the floors of decode steps. Needs matplotlib, which is imported by this file alone."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType

from .errors import BenchmarkError
from .roofline import RANKS, Floor

_STYLES: Mapping[int, LineStyleType] = dict(zip(RANKS, (":", "-.", "--", "-"), strict=True))


def draw(floors: Sequence[Floor], path: Path) -> None:
    """A panel a base, a colour a device, a line a rank: milliseconds by number of adapters.

    Raises:
        BenchmarkError: The file is of no format that can be drawn, or cannot be written.
    """
    bases = [list(group) for _, group in groupby(floors, lambda floor: floor.base)]
    figure = Figure(figsize=(4.5 * len(bases) + 1.5, 4), layout="constrained")
    panels = figure.subplots(1, len(bases), squeeze=False)[0]
    for axes, group in zip(panels, bases, strict=True):
        _draw_base(axes, group)
    panels[0].set_ylabel("floor of a decode step, ms")
    devices = list(dict.fromkeys(floor.device for floor in floors))
    figure.legend(handles=_legend(devices), loc="outside right center")
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise BenchmarkError(f"--plot {path}: {error}") from error


def _draw_base(axes: Axes, floors: Sequence[Floor]) -> None:
    for index, (_, group) in enumerate(groupby(floors, lambda floor: floor.device)):
        without, *others = group
        for rank, style in _STYLES.items():
            line = [without, *(floor for floor in others if floor.rank == rank and floor.fits)]
            axes.plot(
                [floor.adapters for floor in line],
                [floor.step_us / 1000 for floor in line],
                linestyle=style,
                color=f"C{index}",
            )
    gpus = {floor.device: str(floor.gpus) for floor in floors}.values()
    many = f" on {' / '.join(gpus)} GPUs" if set(gpus) != {"1"} else ""
    axes.set_title(floors[0].base + many)
    axes.set_xlabel("different adapters in the batch")
    axes.set_ylim(bottom=0)


def _legend(devices: Sequence[str]) -> list[Line2D]:
    colours = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(devices)]
    styles = [
        Line2D([], [], color="black", linestyle=style, label=f"rank {rank}")
        for rank, style in _STYLES.items()
    ]
    return [*colours, *styles]
