"""add_low_rank in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..cpu.library import INT, POINTER, Kernels, Latest, address, raise_if, require
from .op import LowRankTable, Segments, SiteTargets

_ARGUMENTS = (POINTER, INT, POINTER, INT, INT, INT, INT, POINTER, POINTER, POINTER, INT)


class _Table(ctypes.Structure):
    _fields_ = (
        ("pool", POINTER),
        ("pool_size", INT),
        ("targets", INT),
        ("slots", INT),
        ("rank", POINTER),
        ("a_offset", POINTER),
        ("b_offset", POINTER),
        ("bias_offset", POINTER),
    )


class _Targets(ctypes.Structure):
    _fields_ = (("first", INT), ("count", INT), ("out_starts", POINTER), ("out_sizes", POINTER))


class _Segments(ctypes.Structure):
    _fields_ = (("count", INT), ("start", POINTER), ("end", POINTER), ("adapter_slot", POINTER))


class CompiledLowRank:
    """The operation of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "add_low_rank", _ARGUMENTS)
        self._table = Latest(_prepare_table)
        self._segments = Latest(_prepare_segments)

    def add_low_rank(
        self,
        y: Tensor,
        x: Tensor,
        table: LowRankTable,
        targets: SiteTargets,
        segments: Segments,
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment, a target or an adapter's weights reach outside their tensor.
        """
        rows, in_size = x.shape
        require(y.shape[0] == rows, "add_low_rank: x and y differ in rows")
        error = self._kernels.of(y, x, table.pool)(
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.stride(0),
            rows,
            in_size,
            y.shape[1],
            self._table(table),
            _prepare_targets(targets),
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, "add_low_rank")


def _prepare_table(table: LowRankTable) -> Any:
    targets, slots = table.rank.shape
    for offsets in (table.a_offset, table.b_offset, table.bias_offset):
        require(
            offsets.shape == table.rank.shape, "add_low_rank: ranks and offsets differ in shape"
        )
    return ctypes.byref(
        _Table(
            address(table.pool, table.pool.dtype, "pool"),
            table.pool.numel(),
            targets,
            slots,
            address(table.rank, torch.int32, "rank"),
            address(table.a_offset, torch.int64, "a_offset"),
            address(table.b_offset, torch.int64, "b_offset"),
            address(table.bias_offset, torch.int64, "bias_offset"),
        )
    )


def _prepare_segments(segments: Segments) -> Any:
    count = segments.start.shape[0]
    columns = (segments.start, segments.end, segments.adapter_slot)
    require(
        all(column.shape == (count,) for column in columns),
        "add_low_rank: the segments' start, end and adapter_slot differ in length",
    )
    return ctypes.byref(
        _Segments(count, *(address(column, torch.int32, "segments") for column in columns))
    )


@cache  # a pure function of the model's few sites
def _prepare_targets(targets: SiteTargets) -> Any:
    count = len(targets.out_starts)
    require(len(targets.out_sizes) == count, "add_low_rank: out_starts and out_sizes differ")
    columns = INT * count
    starts, sizes = columns(*targets.out_starts), columns(*targets.out_sizes)
    return ctypes.byref(
        _Targets(targets.first, count, ctypes.cast(starts, POINTER), ctypes.cast(sizes, POINTER))
    )
