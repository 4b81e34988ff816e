"""silu_mul on a GPU: gate, up and y pass through memory once.

One program has 1024 columns of one row, eight a thread, which is one load of 16 bytes where numbers
have 16 bits: a decode step of one row still has a program for every 6 KB that it moves.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gpu.launch import Launch, ceil_div
from ..gpu.registry import register
from ..gpu.rows import PROMPT, ROWS, require
from ..gpu.shapes import Shapes, shape_only
from .gpu_kernels import silu_mul_kernel

BLOCK = 1024
"""Columns of a program."""


def silu_mul_launch(y: Tensor, gate_up: Tensor) -> Launch:
    """Y = silu(gate) * up."""
    num_rows, size = y.shape
    return Launch(
        silu_mul_kernel,
        (num_rows, ceil_div(size, BLOCK)),
        {"y": y, "gate_up": gate_up, "size": size, "row_stride": gate_up.stride(0)},
        {"BLOCK": BLOCK},
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ``op``; raises ValueError for a wrong shape or layout."""
    require(
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0,
        "silu_mul: gate and up differ in width",
        gate_up,
    )
    require(gate_up.stride(1) == 1, "silu_mul: rows must be dense", gate_up)
    return _SILU_MUL(gate_up)  # type: ignore[no-any-return]  # torch's operations have no type


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Of the MLP."""
    for rows in (ROWS, PROMPT):
        gate_up = shape_only(rows, 2 * shapes.inner, dtype=dtype)
        yield silu_mul_launch(_half(gate_up), gate_up)


def _run(gate_up: Tensor) -> Tensor:
    y = _half(gate_up)
    silu_mul_launch(y, gate_up).run()
    return y


def _half(gate_up: Tensor) -> Tensor:
    rows, columns = gate_up.shape
    return torch.empty((rows, columns // 2), dtype=gate_up.dtype, device=gate_up.device)


_SILU_MUL = register("silu_mul(Tensor gate_up) -> Tensor", _run, _half)
