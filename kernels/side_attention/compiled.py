"""add_side_attention in C++ (``cpu.cpp``): checks what it is given and passes addresses."""

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

_ARGUMENTS = (POINTER, POINTER, INT, ROWS, *(INT,) * 3, FLOAT, POINTER, INT, POINTER, INT)


class CompiledSideAttention:
    """The operation of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._kernels = Kernels(library, "add_side_attention", _ARGUMENTS)
        self._table = Latest(prepare_table)
        self._segments = Latest(prepare_segments)

    def add_side_attention(
        self,
        out: Tensor,
        query: Tensor,
        table: PrimitiveTable,
        row: int,
        segments: Segments,
        kv_heads: int,
        scale: float,
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A segment or a cell reaches outside its tensor; nothing was written.
        """
        rows, heads, head_dim = query.shape
        require(
            out.shape == query.shape and (heads == 1 or query.stride(1) == head_dim),
            "add_side_attention: out and query differ in shape, or query's heads are strided",
        )
        require(
            kv_heads > 0 and heads % kv_heads == 0,
            "add_side_attention: the query's heads do not fit the keys'",
        )
        error = self._kernels.of(out, query, table.numbers)(
            address(out, out.dtype, "out"),
            query.data_ptr(),
            query.stride(0),
            rows,
            kv_heads,
            heads // kv_heads,
            head_dim,
            scale,
            self._table(table),
            row,
            self._segments(segments),
            torch.get_num_threads(),
        )
        raise_if(error, "add_side_attention")
