"""replace_rows and correct_embedding in C++ (``cpu.cpp``): checks and passes addresses."""

import torch
from torch import Tensor

from ..cpu.corrections import prepare_segments, prepare_table
from ..cpu.library import INT, POINTER, ROWS, Kernels, Latest, Library, address, raise_if, require
from ..tables import PrimitiveTable, Segments

_ARGUMENTS = (POINTER, POINTER, ROWS, INT, POINTER, INT, POINTER, INT)


class CompiledEmbedding:
    """The operations of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._replace = _Operation(library, "replace_rows")
        self._correct = _Operation(library, "correct_embedding")

    def replace_rows(
        self, x: Tensor, ids: Tensor, table: PrimitiveTable, row: int, segments: Segments
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment, a cell or a token reaches outside its tensor; nothing was
                written.
        """
        self._replace(x, ids, table, row, segments)

    def correct_embedding(
        self, x: Tensor, ids: Tensor, table: PrimitiveTable, row: int, segments: Segments
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment, a cell or a token reaches outside its tensor; nothing was
                written.
        """
        self._correct(x, ids, table, row, segments)


class _Operation:
    """One of the two, which have one signature; each has a table of its own."""

    def __init__(self, library: Library, name: str) -> None:
        self._name = name
        self._kernels = Kernels(library, name, _ARGUMENTS)
        self._table = Latest(prepare_table)
        self._segments = Latest(prepare_segments)

    def __call__(
        self, x: Tensor, ids: Tensor, table: PrimitiveTable, row: int, segments: Segments
    ) -> None:
        rows, hidden = x.shape
        require(ids.shape == (rows,), f"{self._name}: x and ids differ in rows")
        error = self._kernels.of(x, table.numbers)(
            address(x, x.dtype, "x"),
            address(ids, torch.int64, "ids"),
            rows,
            hidden,
            self._table(table),
            row,
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, self._name)
