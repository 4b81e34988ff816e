"""silu_mul in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.library import INT, POINTER, ROWS, Kernels, Library, require

_ARGUMENTS = (POINTER, INT, POINTER, ROWS, INT, INT)


class CompiledSiluMul:
    """The operation of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "silu_mul", _ARGUMENTS)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
        rows, columns = gate_up.shape
        require(columns % 2 == 0, "silu_mul: gate and up differ in width")
        y = torch.empty((rows, columns // 2), dtype=gate_up.dtype)
        self._kernels.of(gate_up)(
            gate_up.data_ptr(),
            gate_up.stride(0),
            y.data_ptr(),
            rows,
            columns // 2,
            torch.get_num_threads(),
        )
        return y
