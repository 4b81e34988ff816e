"""add_bottleneck on a GPU, in two launches for all segments, which meet in float32 scratch:

    down  inner[split, i] = D[:, k in split] z[i, k in split],
    up    out[i] += w (f(sum over splits of inner[:, i] + d) U + u).

The launches are two because f needs the whole sum, and because ``out`` may be the h that z is made
of: down has read all of it before up writes. As in affine, the inputs are split over programs, each
with a plane of its own: a decode step has too few rows to fill a GPU otherwise. D and U are read
once for each block of rows of a segment, z by every block of D's rows, and inner by every block of
columns, from cache; each of those applies f again, which costs less than a third launch. A decode
step's single rows are multiplied by vector units, longer segments by matrix units.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gpu.launch import Argument, Launch, ceil_div, run_all
from ..gpu.registry import register
from ..gpu.rows import PLACE, PROMPT, ROWS, Place, check_place, flat, production_places, require
from ..gpu.shapes import Shapes, shape_only
from ..gpu.tuning import Choice, Key, Measured
from ..tables import PrimitiveTable, Segments
from .gpu_kernels import down_kernel, up_kernel
from .op import AddBottleneck, Cell

NAME = "add_bottleneck"


class Config(NamedTuple):
    """How the two launches are cut into programs.

    Attributes:
        rows: Rows multiplied at once; 1 means vector units, else at least 16.
        width: Rows of D and U at once.
        block_in: Inputs at once in down.
        splits: Programs that share a segment's inputs.
        block_out: Columns of a program of up.
        num_warps: Of both.
    """

    rows: int
    width: int
    block_in: int
    splits: int
    block_out: int
    num_warps: int


CONFIGS = (
    Config(1, 16, 256, 8, 256, 4),
    Config(1, 32, 128, 16, 256, 4),
    Config(16, 16, 128, 8, 128, 4),
    Config(16, 64, 64, 8, 128, 4),
    Config(64, 64, 64, 2, 64, 4),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    return 2 if key.rows <= 16 and key.inner <= 16 else 3


def launches(out: Tensor, h: Tensor, r: Tensor, config: int, place: Place) -> Sequence[Launch]:
    """Down, then up."""
    chosen, (num_rows, hidden) = CONFIGS[config], out.shape
    max_inner = max(place.max_inner, 1)
    inner = torch.empty(
        (chosen.splits, num_rows, max_inner), dtype=torch.float32, device=out.device
    )
    shared: dict[str, Argument] = {
        "inner": inner,
        **place.segments,
        "hidden": hidden,
        "num_rows": num_rows,
        "max_inner": max_inner,
    }
    constants = {
        "FIELDS": len(Cell._fields),
        "SPLITS": chosen.splits,
        "BLOCK_ROWS": chosen.rows,
        "BLOCK_WIDTH": chosen.width,
    }
    across = chosen.splits * ceil_div(place.max_inner, chosen.width)
    columns = ceil_div(hidden, chosen.block_out)
    down = Launch(
        down_kernel,
        (place.num_segments, place.parts(chosen.rows, across), across),
        {"h": h, "r": r, **shared},
        {**constants, "BLOCK_IN": chosen.block_in},
        num_warps=chosen.num_warps,
        matrix=chosen.rows > 1,
    )
    up = Launch(
        up_kernel,
        (place.num_segments, place.parts(chosen.rows, columns), columns),
        {"out": out, **shared, "seg_weight": place.weight},
        {**constants, "BLOCK_OUT": chosen.block_out},
        num_warps=chosen.num_warps,
        matrix=chosen.rows > 1,
    )
    return (down, up)


def tuned(measured: Measured) -> AddBottleneck:
    """The operation, with the configurations that were measured best on the device."""
    return partial(_add_bottleneck, Choice(NAME, choose_config, len(CONFIGS), measured))


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Both launches of every configuration, of a decode step and of a prompt."""
    for rows, place in zip((ROWS, PROMPT), production_places(dtype), strict=True):
        x = shape_only(rows, shapes.hidden, dtype=dtype)
        for config in range(len(CONFIGS)):
            yield from launches(x, x, x, config, place)


def _add_bottleneck(
    choice: Choice,
    out: Tensor,
    h: Tensor,
    r: Tensor,
    table: PrimitiveTable,
    row: int,
    segments: Segments,
) -> None:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    check_place(NAME, out, table, [h, r])
    for each in (h, r):
        require(each.is_contiguous(), f"{NAME}: h and r must be contiguous", each)
    config = choice(Key.of(segments.max_rows, segments.max_inner, out.shape[1]))
    _ADD(out, h, r, config, *flat(table, row, segments))


def _run(out: Tensor, h: Tensor, r: Tensor, config: int, *place: Any) -> None:
    run_all(launches(out, h, r, config, Place(*place)))


_ADD = register(f"{NAME}(Tensor(a!) out, Tensor h, Tensor r, int config, {PLACE}) -> ()", _run)
