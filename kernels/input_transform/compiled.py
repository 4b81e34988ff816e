"""The operations of ``op`` in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.corrections import prepare_segments, prepare_table, prepare_targets
from ..cpu.library import INT, POINTER, Kernels, Latest, Library, address, raise_if, require
from ..tables import PrimitiveTable, Segments, SiteTargets

_TRANSFORM = (POINTER, INT, INT, INT, POINTER, INT, POINTER, INT)
_SPREAD = (POINTER, POINTER, INT, INT, INT, POINTER, INT, INT, INT)
_COLLECT = (POINTER, INT, INT, POINTER, INT, POINTER, INT)


class CompiledInputTransform:
    """The operations of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "transform_input", _TRANSFORM)
        self._spread = Kernels(library, "spread_rows", _SPREAD)
        self._collect = Kernels(library, "collect_outputs", _COLLECT)
        self._table = Latest(prepare_table)
        self._segments = Latest(prepare_segments)

    def transform_input(
        self, x: Tensor, table: PrimitiveTable, row: int, segments: Segments
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment, a cell or a permutation reaches outside its tensor. Other rows
                may then have been changed where the permutation is what is wrong.
        """
        rows, size = x.shape
        error = self._kernels.of(x, table.numbers)(
            x.data_ptr(),
            x.stride(0),
            rows,
            size,
            self._table(table),
            row,
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, "transform_input")

    def spread_rows(self, x: Tensor, chosen: Tensor, copies: int) -> Tensor:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A chosen row is none of x.
        """
        rows, size = x.shape
        (count,) = chosen.shape
        wide = torch.empty((rows + copies * count, size), dtype=x.dtype)
        error = self._spread.of(x)(
            wide.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            rows,
            size,
            address(chosen, torch.int64, "the chosen rows"),
            count,
            copies,
            torch.get_num_threads(),
        )
        raise_if(error, "spread_rows")
        return wide

    def collect_outputs(self, y: Tensor, chosen: Tensor, targets: SiteTargets) -> Tensor:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A chosen row or a target's column is none of y.
        """
        (count,) = chosen.shape
        rows = len(y) - (len(targets.out_starts) - 1) * count
        require(y.is_contiguous() and rows >= 0, "collect_outputs: y lacks rows or is not dense")
        error = self._collect.of(y)(
            y.data_ptr(),
            rows,
            y.shape[1],
            address(chosen, torch.int64, "the chosen rows"),
            count,
            prepare_targets(targets),
            torch.get_num_threads(),
        )
        raise_if(error, "collect_outputs")
        return y[:rows]
