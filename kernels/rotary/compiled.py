"""rotary in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.library import INT, POINTER, ROWS, Kernels, Library, require

_ARGUMENTS = (POINTER, INT, INT, POINTER, INT, POINTER, INT, ROWS, INT, INT, INT)


class CompiledRotary:
    """The operation of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "rotary", _ARGUMENTS)

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
        """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
        rows, half = cos.shape
        for table in (cos, sin):
            require(
                table.shape == (rows, half)
                and table.dtype is torch.float32
                and table.is_cpu
                and table.stride(1) == 1,
                "rotary: cos and sin must be (rows, head_dim / 2) float32 on the CPU",
            )
        for heads in (query, key):
            require(
                heads.shape[0] == rows and heads.shape[2] == 2 * half,
                "rotary: query, key, cos and sin do not fit together",
            )
            self._kernels.of(heads)(
                heads.data_ptr(),
                heads.stride(0),
                heads.stride(1),
                cos.data_ptr(),
                cos.stride(0),
                sin.data_ptr(),
                sin.stride(0),
                rows,
                heads.shape[1],
                half,
                torch.get_num_threads(),
            )
