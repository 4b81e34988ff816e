"""Corrections of linear modules on a GPU: from dataclasses to an operation's flat arguments.

A kernel of these finds a segment's rows and adapter in device memory, the adapter's tensors through
the table, and the target by its program's index: nothing of a batch but its size is known on the
host when it is launched, so that a captured launch serves later batches of that size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..tables import CorrectLinear, PrimitiveTable, Segments, SiteTargets
from .launch import Launch, ceil_div, run_all
from .registry import register
from .shapes import Shapes, shape_only
from .tuning import Choice, ChooseConfig, Key, Measured

MAX_TARGETS = 4
"""Of one site: q, k, v and room for another; their columns travel as scalars."""

MAX_PROGRAMS = 2048
"""Of one segment and target: enough to fill a GPU; more cost time where segments are short."""

_SCHEMA = (
    "(Tensor(a!) y, Tensor x, Tensor cells, Tensor numbers, Tensor indices, int first,"
    " int[] out_starts, int[] out_sizes, Tensor start, Tensor end, Tensor slot, Tensor weight,"
    " int max_rows, int max_inner, int config) -> ()"
)


@dataclass(frozen=True, slots=True)
class Site:
    """The operands of one correction, as kernels take them.

    Attributes:
        y: (rows, out), changed in place.
        x: (rows, in).
        cells: (table rows, adapter slots, fields) int64.
        numbers: The pool, as the base's dtype.
        indices: The pool, as int32.
        first: Table row of the first target.
        out_starts: First output column of each target.
        out_sizes: Output columns of each target.
        start: (segments,) int32, and so on as in ``tables.Segments``.
        end: One past the last row.
        slot: Adapter slots.
        weight: float32.
        max_rows: Rows of the longest segment, as the host knows them.
        max_inner: Bound on the inner width of these adapters' cells.
    """

    y: Tensor
    x: Tensor
    cells: Tensor
    numbers: Tensor
    indices: Tensor
    first: int
    out_starts: Sequence[int]
    out_sizes: Sequence[int]
    start: Tensor
    end: Tensor
    slot: Tensor
    weight: Tensor
    max_rows: int
    max_inner: int

    @property
    def num_segments(self) -> int:
        """Some may be empty."""
        return self.start.shape[0]

    @property
    def num_targets(self) -> int:
        """Of the site."""
        return len(self.out_starts)

    @property
    def widest(self) -> int:
        """Columns of the widest target."""
        return max(self.out_sizes, default=0)

    @property
    def segments(self) -> dict[str, Any]:
        """The arguments by which a kernel finds a segment and its adapter's cell."""
        return {
            "cells": self.cells,
            "numbers": self.numbers,
            "seg_start": self.start,
            "seg_end": self.end,
            "seg_slot": self.slot,
            "first": self.first,
            "num_slots": self.cells.shape[1],
        }

    @property
    def columns(self) -> dict[str, int]:
        """The arguments by which a kernel finds a target's columns."""
        padding = [0] * (MAX_TARGETS - self.num_targets)
        return {
            **{f"out_start_{i}": each for i, each in enumerate([*self.out_starts, *padding])},
            **{f"out_size_{i}": each for i, each in enumerate([*self.out_sizes, *padding])},
        }

    @property
    def strides(self) -> dict[str, int]:
        """The arguments by which a kernel finds a row of x and of y."""
        return {"x_stride": self.x.stride(0), "y_stride": self.y.stride(0)}

    def num_programs(self, block_rows: int, block_out: int) -> int:
        """Programs that share the tiles (rows, columns) of a segment and target."""
        tiles = ceil_div(self.max_rows, block_rows) * ceil_div(self.widest, block_out)
        return min(tiles, MAX_PROGRAMS)

    def parts(self, block_rows: int, others: int) -> int:
        """Programs that share a segment's blocks of rows, where ``others`` more multiply them.

        At least one, and more than that only as long as there are no more than ``MAX_PROGRAMS``.
        """
        room = MAX_PROGRAMS // max(self.num_segments * self.num_targets * others, 1)
        return max(1, min(ceil_div(self.max_rows, block_rows), room))


class Correction:
    """A GPU operation with the signature ``tables.CorrectLinear``, known to torch by its name.

    Args:
        name: As the ``op`` module calls it; torch knows it as ``deltamux::<name>``.
        launches: What computes it, for one of its configurations.
        choose_config: The configuration to take for sizes that were not measured.
        num_configs: How many there are.
        allows_float32_rows: Whether x and y may be float32 over a pool of 16 bits.
    """

    def __init__(
        self,
        name: str,
        launches: Callable[[Site, int], Sequence[Launch]],
        choose_config: ChooseConfig,
        num_configs: int,
        allows_float32_rows: bool = False,
    ) -> None:
        """Register the operation."""
        self.name = name
        self.launches = launches
        self.choose_config = choose_config
        self.num_configs = num_configs
        self._allows_float32_rows = allows_float32_rows
        self._operation = register(name + _SCHEMA, self._run)

    def tuned(self, measured: Measured) -> CorrectLinear:
        """The operation, with the configurations that were measured best on the device."""
        choice = Choice(self.name, self.choose_config, self.num_configs, measured)
        return partial(self._correct, choice)

    def production(self, shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
        """The launches of every configuration at the site with the most targets of a base."""
        for config in range(self.num_configs):
            yield from self.launches(production_site(shapes, dtype), config)

    def _correct(
        self,
        choice: Choice,
        y: Tensor,
        x: Tensor,
        table: PrimitiveTable,
        targets: SiteTargets,
        segments: Segments,
    ) -> None:
        """See the ``op`` module of this name.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
        """
        check_rows(self.name, y, x)
        check_table(self.name, table, y, self._allows_float32_rows)
        if not len(targets.out_starts) == len(targets.out_sizes) <= MAX_TARGETS:
            raise ValueError(f"{self.name}: a site has up to {MAX_TARGETS} targets, not {targets}")
        self._operation(
            y,
            x,
            table.cells,
            table.numbers,
            table.indices,
            targets.first,
            targets.out_starts,
            targets.out_sizes,
            segments.start,
            segments.end,
            segments.adapter_slot,
            segments.weight,
            segments.max_rows,
            segments.max_inner,
            choice(Key.of(segments.max_rows, segments.max_inner, x.shape[1])),
        )

    def _run(self, *operands: Any) -> None:
        *site, config = operands
        run_all(self.launches(Site(*site), config))


def production_site(shapes: Shapes, dtype: torch.dtype) -> Site:
    """The site with the most targets, for 64 rows in segments of up to 64, without memory."""
    _, in_size, out_sizes = shapes.sites[0]
    rows, slots, fields, pool = 64, 256, 8, 1 << 30
    index = partial(shape_only, dtype=torch.int32)
    return Site(
        y=shape_only(rows, sum(out_sizes), dtype=dtype),
        x=shape_only(rows, in_size, dtype=dtype),
        cells=shape_only(512, slots, fields, dtype=torch.int64),
        numbers=shape_only(pool, dtype=dtype),
        indices=index(pool),
        first=7,
        out_starts=tuple(accumulate(out_sizes[:-1], initial=0)),
        out_sizes=tuple(out_sizes),
        start=index(rows),
        end=index(rows),
        slot=index(rows),
        weight=shape_only(rows, dtype=torch.float32),
        max_rows=rows,
        max_inner=64,
    )


def check_rows(name: str, *tensors: Tensor) -> None:
    """Raise ValueError unless all have as many rows, one dtype, one device and dense rows."""
    first = tensors[0]
    for tensor in tensors:
        if (tensor.shape[0], tensor.dtype, tensor.device) != (
            first.shape[0],
            first.dtype,
            first.device,
        ) or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected {first.shape[0]} rows of {first.dtype} on {first.device}, dense"
                f" in their last dimension; got {tuple(tensor.shape)} of {tensor.dtype} on"
                f" {tensor.device} with strides {tensor.stride()}"
            )


def check_table(
    name: str, table: PrimitiveTable, like: Tensor, allows_float32: bool = False
) -> None:
    """Raise ValueError unless the table's tensors are where ``like`` is, dense and of its dtype.

    Where ``allows_float32``, ``like`` may be of float32 over any pool.
    """
    cells, numbers, indices = table.cells, table.numbers, table.indices
    devices = {tensor.device for tensor in (cells, numbers, indices, like)}
    if len(devices) > 1 or not (cells.is_contiguous() and numbers.is_contiguous()):
        raise ValueError(f"{name}: the table's tensors must be dense and on {like.device}")
    if numbers.dtype is not like.dtype and not (allows_float32 and like.dtype is torch.float32):
        raise ValueError(f"{name}: the pool holds {numbers.dtype}, the rows {like.dtype}")
