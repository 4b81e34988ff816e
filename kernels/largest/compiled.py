"""largest in C++ (``cpu.cpp``): checks what it is given and passes addresses.

Torch's own looks at one number after the other on a single thread.
"""

import torch
from torch import Tensor

from ..cpu.library import INT, POINTER, ROWS, Library, raise_if, require

_ARGUMENTS = (POINTER, POINTER, INT, ROWS, INT, INT)


class CompiledLargest:
    """The operation of ``op`` on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernel in the library."""
        self._kernel = library.kernel("largest", _ARGUMENTS)

    def largest(self, x: Tensor) -> Tensor:
        """See ``op``.

        Raises:
            ValueError: The tensor has the wrong dtype, device or layout.
            IndexError: Its rows are empty.
        """
        rows, size = x.shape
        require(
            x.dtype is torch.float32 and x.is_cpu and x.stride(1) == 1,
            "largest: expected float32 on the CPU, dense in its rows",
        )
        indices = torch.empty(rows, dtype=torch.int32)
        error = self._kernel(
            indices.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            rows,
            size,
            torch.get_num_threads(),
        )
        raise_if(error, "largest")
        return indices
