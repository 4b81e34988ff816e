"""add_bottleneck in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.corrections import prepare_segments, prepare_table
from ..cpu.library import INT, POINTER, ROWS, Kernels, Latest, Library, address, raise_if, require
from ..tables import PrimitiveTable, Segments

_ARGUMENTS = (POINTER, POINTER, POINTER, ROWS, INT, POINTER, INT, POINTER, INT)


class CompiledBottleneck:
    """The operation of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "add_bottleneck", _ARGUMENTS)
        self._table = Latest(prepare_table)
        self._segments = Latest(prepare_segments)

    def add_bottleneck(
        self,
        out: Tensor,
        h: Tensor,
        r: Tensor,
        table: PrimitiveTable,
        row: int,
        segments: Segments,
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment or a cell reaches outside its tensor; nothing was written.
        """
        rows, hidden = out.shape
        require(
            h.shape == r.shape == out.shape,
            "add_bottleneck: out, h and r differ in shape",
        )
        error = self._kernels.of(out, h, r, table.numbers)(
            address(out, out.dtype, "out"),
            address(h, out.dtype, "h"),
            address(r, out.dtype, "r"),
            rows,
            hidden,
            self._table(table),
            row,
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, "add_bottleneck")
