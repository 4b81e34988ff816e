"""Transforms of a target's input: scaling (IA3), then block-diagonal rotations (OFT, BOFT).

    x[i:j] <- s * x[i:j],   then for each stage z = x[:, p];  z_k <- z_k R_k for every block k;
    x[:, p] = z,

where x (rows, in) is changed in place, p is the stage's permutation (none: the identity), and block
k of b columns is multiplied from the right by R_k (b, b).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..tables import PrimitiveTable, Segments


class Cell(NamedTuple):
    """One adapter on one target.

    Attributes:
        stages: Rotations one after another; 0 without any.
        num_blocks: Blocks stored a stage: in / b, or 1 where all share it.
        block: b.
        rotations: Offset of R (stages, num_blocks, b, b).
        permutations: Offset (int32) of p (stages, in), -1 where all are the identity.
        scale: Offset of s (in,), -1 without one.
    """

    stages: int
    num_blocks: int = 0
    block: int = 0
    rotations: int = -1
    permutations: int = -1
    scale: int = -1


TransformInput = Callable[[Tensor, PrimitiveTable, int, Segments], None]
"""transform_input(x, table, row, segments): x (rows, in), dense, changed in place for the target of
table row ``row``; the segments' weights are not used."""
