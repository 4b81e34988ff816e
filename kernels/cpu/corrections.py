"""Tables, targets and segments as the C++ kernels take them (``cpu/tables.h``).

With them come the kernels of every correction of linear modules, which all have one signature.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..tables import PrimitiveTable, Segments, SiteTargets
from .library import INT, POINTER, ROWS, Kernels, Latest, Library, address, raise_if, require

_ARGUMENTS = (POINTER, INT, POINTER, INT, ROWS, INT, INT, POINTER, POINTER, POINTER, INT)


class _Table(ctypes.Structure):
    _fields_ = (
        ("cells", POINTER),
        ("rows", INT),
        ("slots", INT),
        ("fields", INT),
        ("numbers", POINTER),
        ("num_numbers", INT),
        ("indices", POINTER),
        ("num_indices", INT),
    )


class _Targets(ctypes.Structure):
    _fields_ = (("first", INT), ("count", INT), ("out_starts", POINTER), ("out_sizes", POINTER))


class _Segments(ctypes.Structure):
    _fields_ = (
        ("count", INT),
        ("start", POINTER),
        ("end", POINTER),
        ("adapter_slot", POINTER),
        ("weight", POINTER),
    )


def prepare_table(table: PrimitiveTable) -> Any:
    """The ``Table`` of ``tables.h`` by reference; valid while the table's tensors are.

    Raises:
        ValueError: A tensor has the wrong dtype, device, shape or layout.
    """
    require(table.cells.dim() == 3, "a table's cells must be (rows, adapter_slots, fields)")
    return ctypes.byref(
        _Table(
            address(table.cells, torch.int64, "cells"),
            *table.cells.shape,
            address(table.numbers, table.numbers.dtype, "numbers"),
            table.numbers.numel(),
            address(table.indices, torch.int32, "indices"),
            table.indices.numel(),
        )
    )


def prepare_segments(segments: Segments) -> Any:
    """The ``Segments`` of ``tables.h`` by reference; valid while the segments' tensors are.

    Raises:
        ValueError: A tensor has the wrong dtype, device, shape or layout.
    """
    count = segments.start.shape[0]
    columns = (segments.start, segments.end, segments.adapter_slot)
    require(
        all(column.shape == (count,) for column in (*columns, segments.weight)),
        "the segments' start, end, adapter_slot and weight differ in length",
    )
    return ctypes.byref(
        _Segments(
            count,
            *(address(column, torch.int32, "segments") for column in columns),
            address(segments.weight, torch.float32, "the segments' weight"),
        )
    )


@cache  # a pure function of the model's few sites
def prepare_targets(targets: SiteTargets) -> Any:
    """The ``Targets`` of ``tables.h`` by reference.

    Raises:
        ValueError: There are not as many starts as sizes.
    """
    count = len(targets.out_starts)
    require(len(targets.out_sizes) == count, "a site's out_starts and out_sizes differ in length")
    columns = INT * count
    starts, sizes = columns(*targets.out_starts), columns(*targets.out_sizes)
    return ctypes.byref(
        _Targets(targets.first, count, ctypes.cast(starts, POINTER), ctypes.cast(sizes, POINTER))
    )


class CompiledCorrection:
    """One operation of signature ``tables.CorrectLinear``, for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library, name: str) -> None:
        """Find the kernels of this name in the library."""
        self._name = name
        self._kernels = Kernels(library, name, _ARGUMENTS)
        self._table = Latest(prepare_table)
        self._segments = Latest(prepare_segments)

    def __call__(
        self,
        y: Tensor,
        x: Tensor,
        table: PrimitiveTable,
        targets: SiteTargets,
        segments: Segments,
    ) -> None:
        """See the ``op`` module of this name.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment, a target, a cell or an index reaches outside its tensor. Rows of
                ``y`` may then have been changed where an index tensor's values are what is wrong.
        """
        rows, in_size = x.shape
        require(y.shape[0] == rows, f"{self._name}: x and y differ in rows")
        error = self._kernels.of(y, x, table.numbers)(
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.stride(0),
            rows,
            in_size,
            y.shape[1],
            self._table(table),
            prepare_targets(targets),
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, self._name)
