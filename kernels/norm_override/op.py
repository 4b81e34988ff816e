"""Norms with another weight: recomputes the rows of adapters that replace it.

    y[i:j] = g(s) * normalized(x[i:j]) + b(s),

normalized(x) = x / sqrt(mean(x²) + eps), or (x - mean(x)) / sqrt(var(x) + eps) where ``centered``;
computed in float32 and rounded as the base's own norm is: once where ``centered`` (torch's
layer_norm); else as ``rms_norm/op.py`` says, and once more after b, which no such norm has.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..tables import PrimitiveTable, Segments


class Cell(NamedTuple):
    """One adapter on one norm.

    Attributes:
        weight: Offset of g (size,).
        bias: Offset of b (size,), -1 without one.
    """

    weight: int
    bias: int = -1


OverrideNorm = Callable[[Tensor, Tensor, PrimitiveTable, int, Segments, float, bool], None]
"""override_norm(y, x, table, row, segments, eps, centered): x and y are (rows, size) or (rows,
heads, size); y is dense and changed in place, x dense in its last dimension; ``row`` is the norm's
table row; the segments' weights are not used."""
