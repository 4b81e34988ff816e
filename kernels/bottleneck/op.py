"""Bottleneck adapters beside a layer's half (arXiv:1902.00751), and linear interventions (ReFT).

    out[i:j] += w (f(z D(s)ᵀ + d(s)) U(s) + u(s)),     z = h, r or h + r of the same rows,

with h (rows, hidden) what attention or MLP computed and r the residual stream before it is added.
h + r is rounded to the dtype, as the base rounds the same sum; all else is float32 up to the one
rounding of the result.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from ..tables import PrimitiveTable, Segments


class Source(IntEnum):
    """What the bottleneck reads."""

    OUTPUT = 0
    RESIDUAL = 1
    SUM = 2


class Activation(IntEnum):
    """f, by the names of transformers' ACT2FN."""

    LINEAR = 0
    RELU = 1
    SILU = 2
    GELU = 3  # exact: x Phi(x)
    GELU_TANH = 4  # gelu_new, gelu_pytorch_tanh
    TANH = 5
    SIGMOID = 6
    LEAKY_RELU = 7  # slope 0.01
    GELU_QUICK = 8  # x sigmoid(1.702 x)
    RELU6 = 9
    RELU_SQUARED = 10  # relu(x)^2


class Cell(NamedTuple):
    """One adapter at one half of one layer.

    Attributes:
        width: Rows of D and U.
        activation: An ``Activation``.
        source: A ``Source``.
        down: Offset of D (width, hidden).
        up: Offset of U (width, hidden): the checkpoint's up projection transposed.
        down_bias: Offset of d (width,), -1 without one.
        up_bias: Offset of u (hidden,), -1 without one.
    """

    width: int
    activation: int
    source: int
    down: int
    up: int
    down_bias: int = -1
    up_bias: int = -1


AddBottleneck = Callable[[Tensor, Tensor, Tensor, PrimitiveTable, int, Segments], None]
"""add_bottleneck(out, h, r, table, row, segments): all (rows, hidden) and dense; ``out`` is changed
in place and may be ``h`` itself; ``row`` is the half's table row."""
