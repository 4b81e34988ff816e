"""rms_norm and add_rms_norm in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.library import FLOAT, INT, POINTER, ROWS, Kernels, Library, require

_NORM_ARGUMENTS = (POINTER, INT, INT, POINTER, POINTER, ROWS, INT, INT, FLOAT, INT)
_ADD_ARGUMENTS = (POINTER, INT, POINTER, INT, POINTER, POINTER, ROWS, INT, FLOAT, INT)


class CompiledRMSNorm:
    """The operations of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._norm = Kernels(library, "rms_norm", _NORM_ARGUMENTS)
        self._add_norm = Kernels(library, "add_rms_norm", _ADD_ARGUMENTS)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
        shape = x.shape
        require(len(shape) in (2, 3), "rms_norm: x must be (rows, size) or (rows, heads, size)")
        require(weight.shape == shape[-1:], "rms_norm: the weight does not fit x")
        per_head = len(shape) == 3
        y = torch.empty(shape, dtype=x.dtype)
        self._norm.of(x, weight)(
            x.data_ptr(),
            x.stride(0),
            x.stride(1) if per_head else 0,
            weight.data_ptr(),
            y.data_ptr(),
            shape[0],
            shape[1] if per_head else 1,
            shape[-1],
            eps,
            torch.get_num_threads(),
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
        rows, size = x.shape
        require(
            residual.shape == x.shape and weight.shape == (size,),
            "add_rms_norm: x, the residual and the weight do not fit together",
        )
        y = torch.empty((rows, size), dtype=x.dtype)
        self._add_norm.of(x, residual, weight)(
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr(),
            residual.stride(0),
            weight.data_ptr(),
            y.data_ptr(),
            rows,
            size,
            eps,
            torch.get_num_threads(),
        )
        return y
