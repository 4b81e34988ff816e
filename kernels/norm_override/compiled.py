"""override_norm in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.corrections import prepare_segments, prepare_table
from ..cpu.library import (
    FLOAT,
    INT,
    POINTER,
    ROWS,
    Kernels,
    Latest,
    Library,
    address,
    raise_if,
    require,
)
from ..tables import PrimitiveTable, Segments

_ARGUMENTS = (POINTER, POINTER, INT, INT, ROWS, INT, INT, FLOAT, INT, POINTER, INT, POINTER, INT)


class CompiledNormOverride:
    """The operation of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "override_norm", _ARGUMENTS)
        self._table = Latest(prepare_table)
        self._segments = Latest(prepare_segments)

    def override_norm(
        self,
        y: Tensor,
        x: Tensor,
        table: PrimitiveTable,
        row: int,
        segments: Segments,
        eps: float,
        centered: bool,
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment or a cell reaches outside its tensor; nothing was written.
        """
        shape = x.shape
        require(y.shape == shape, "override_norm: x and y differ in shape")
        require(
            len(shape) in (2, 3), "override_norm: x must be (rows, size) or (rows, heads, size)"
        )
        per_head = len(shape) == 3
        error = self._kernels.of(y, x, table.numbers)(
            address(y, y.dtype, "y"),
            x.data_ptr(),
            x.stride(0),
            x.stride(1) if per_head else 0,
            shape[0],
            shape[1] if per_head else 1,
            shape[-1],
            eps,
            centered,
            self._table(table),
            row,
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, "override_norm")
