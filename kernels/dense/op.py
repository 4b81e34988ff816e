"""Whole weight differences: ``y[i:j, columns(t)] += w x[i:j] D(t, s)ᵀ``; a ``CorrectLinear``.

For corrections with no cheaper exact form, and for replaced weights (then ``affine`` sets g = 0).
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One adapter on one target.

    Attributes:
        weight: Offset of D (out, in).
    """

    weight: int
