"""The operation of ``op`` in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

import torch
from torch import Tensor

from ..cpu.corrections import prepare_segments, prepare_table, prepare_targets
from ..cpu.library import INT, POINTER, ROWS, Kernels, Latest, Library, raise_if
from ..tables import PrimitiveTable, Segments, SiteTargets

_ARGUMENTS = (POINTER, INT, POINTER, INT, ROWS, INT, POINTER, POINTER, POINTER, INT)


class CompiledInputTransform:
    """``transform_inputs`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "transform_inputs", _ARGUMENTS)
        self._table = Latest(prepare_table)
        self._segments = Latest(prepare_segments)

    def transform_inputs(
        self, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
    ) -> Tensor:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment, a target, a cell or a permutation reaches outside its tensor.
        """
        rows, size = x.shape
        inputs = torch.empty((len(targets.out_starts), rows, size), dtype=x.dtype)
        error = self._kernels.of(x, table.numbers)(
            inputs.data_ptr(),
            inputs.stride(0),
            x.data_ptr(),
            x.stride(0),
            rows,
            size,
            self._table(table),
            prepare_targets(targets),
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, "transform_inputs")
        return inputs
