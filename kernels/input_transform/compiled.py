"""transform_input in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.corrections import prepare_segments, prepare_table
from ..cpu.library import INT, POINTER, Kernels, Latest, Library, raise_if
from ..tables import PrimitiveTable, Segments

_ARGUMENTS = (POINTER, INT, INT, INT, POINTER, INT, POINTER, INT)


class CompiledInputTransform:
    """The operation of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "transform_input", _ARGUMENTS)
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
