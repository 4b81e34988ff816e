"""Transforms of a target's input: scaling (IA3), then block-diagonal rotations (OFT, BOFT).

    inputs[t, i:j] = s * x[i:j],   then for each stage z = inputs[t, i:j, p];  z_k <- z_k R_k for
    every block k;  inputs[t, i:j, p] = z,

where p is the stage's permutation (none: the identity), and block k of b columns is multiplied from
the right by R_k (b, b). Targets of one GEMM may each want another input, so that each gets one:
what is made of them is ``linear.op.LinearOp.per_target``.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..tables import PrimitiveTable, Segments, SiteTargets


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


TransformInputs = Callable[[Tensor, PrimitiveTable, SiteTargets, Segments], Tensor]
"""transform_inputs(x, table, targets, segments): new inputs (targets, rows, in), contiguous, of the
site's targets for x (rows, in), dense in its last dimension; rows whose adapters have no cell at a
target are those of x. The segments' weights are not used."""
