"""gather_rows in C++ (``cpu.cpp``): checks what it is given and passes addresses.

Torch's own takes thirty times as long for the few rows of a decode step.
"""

import torch
from torch import Tensor

from ..cpu.library import INT, POINTER, ROWS, Library, address, raise_if

_ARGUMENTS = (POINTER, POINTER, INT, INT, POINTER, ROWS, INT)


class CompiledGather:
    """The operation of ``op`` on the CPU, for rows of any dtype."""

    def __init__(self, library: Library) -> None:
        """Find the kernel in the library."""
        self._kernel = library.kernel("gather_rows", _ARGUMENTS)

    def gather_rows(self, table: Tensor, indices: Tensor) -> Tensor:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device or layout.
            IndexError: An index is none of the table's rows.
        """
        (rows,), (entries, size) = indices.shape, table.shape
        y = torch.empty((rows, size), dtype=table.dtype)
        error = self._kernel(
            y.data_ptr(),
            address(table, table.dtype, "a table"),
            entries,
            size * table.itemsize,
            address(indices, torch.int64, "indices"),
            rows,
            torch.get_num_threads(),
        )
        raise_if(error, "gather_rows")
        return y
