"""The products on the processor's matrix unit (AMX), where it has one and the system lends it.

oneDNN uses that unit too, but is made for many rows: with 16, a step that ought to wait for memory
waits for oneDNN. Where there is no such unit, weights go to ``packed``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cpu.corrections import prepare_targets
from ..cpu.library import INT, POINTER, ROWS, Kernel, Library, raise_if, require
from ..memory import HugeMemory
from ..tables import SiteTargets
from .op import LinearOp
from .packed import prepare_linear as prepare_packed

_ARGUMENTS = (POINTER, POINTER, INT, INT, ROWS, INT, INT, POINTER, POINTER, POINTER, INT)

_WEIGHT_BYTES = 1 << 26
"""Reserved at a time for packed weights; what is not used is not touched."""


@dataclass(frozen=True, slots=True)
class _PackedLinear:
    """y = x Wᵀ + b.

    Attributes:
        multiply: The C function.
        packed: W in tiles, as ``cpu.cpp`` says.
        bias: b (out,), None without one.
        in_size: Inputs.
        whole: All outputs as one target.
    """

    multiply: Kernel
    packed: Tensor
    bias: Tensor | None
    in_size: int
    whole: SiteTargets

    def __call__(self, x: Tensor, /) -> Tensor:
        """See ``LinearOp``.

        Raises:
            ValueError: It has another width, another dtype, or gaps within its rows.
        """
        return self._multiplied(x[None], self.whole)

    def per_target(self, inputs: Tensor, _: Tensor, targets: SiteTargets, /) -> Tensor:
        """See ``LinearOp``.

        Raises:
            ValueError: They have another width, another dtype, or gaps within their rows, or there
                are not as many as targets.
            IndexError: A target reaches outside the output's columns.
        """
        require(len(inputs) == len(targets.out_starts), "every target wants an input of its own")
        return self._multiplied(inputs, targets)

    def _multiplied(self, inputs: Tensor, targets: SiteTargets) -> Tensor:
        _, rows, size = inputs.shape
        (out_size,) = self.whole.out_sizes
        require(
            inputs.dtype is torch.bfloat16 and size == self.in_size and inputs.stride(2) == 1,
            f"expected dense bfloat16 rows of {self.in_size}",
        )
        y = torch.empty(rows, out_size, dtype=torch.bfloat16)
        error = self.multiply(
            y.data_ptr(),
            inputs.data_ptr(),
            inputs.stride(0),
            inputs.stride(1),
            rows,
            self.in_size,
            out_size,
            self.packed.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            prepare_targets(targets),
            torch.get_num_threads(),
        )
        raise_if(error, "linear")
        return y


class CompiledLinear:
    """``linear/op.py`` for the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the functions, and ask for the matrix unit."""
        self._library = library
        self._memory = HugeMemory(_WEIGHT_BYTES)
        self._packed_size = library.function("packed_size", (INT, INT), INT)
        self._pack = library.function("pack_linear", (POINTER, INT, INT, POINTER), None)
        self.has_matrix_unit = bool(library.function("has_matrix_unit", (), INT)())

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> LinearOp:
        """y = x Wᵀ + b, a bfloat16 weight packed into tiles where there is a matrix unit."""
        if weight.dtype is not torch.bfloat16 or not self.has_matrix_unit:
            return prepare_packed(weight, bias)
        out_size, in_size = weight.shape
        packed = self._memory.empty((self._packed_size(in_size, out_size),), weight.dtype)
        dense = weight.contiguous()
        self._pack(dense.data_ptr(), in_size, out_size, packed.data_ptr())
        offset = None if bias is None else bias.contiguous()
        multiply = self._library.kernel(
            "linear_bfloat16", _ARGUMENTS, f"linear {in_size} -> {out_size}"
        )
        return _PackedLinear(multiply, packed, offset, in_size, SiteTargets(0, (0,), (out_size,)))
