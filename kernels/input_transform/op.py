"""Transforms of a target's input: scaling (IA3), then block-diagonal rotations (OFT, BOFT).

    x[i:j] <- s * x[i:j],   then for each stage z = x[:, p];  z_k <- z_k R_k for every block k;
    x[:, p] = z,

where x (rows, in) is changed in place, p is the stage's permutation (none: the identity), and block
k of b columns is multiplied from the right by R_k (b, b).

Targets of one GEMM may each want another input. So the batch grows: rows that have any transform
are appended once more for each target but the first (``spread_rows``), and what the GEMM makes of
them goes back to their targets' columns (``collect_outputs``).
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


TransformInput = Callable[[Tensor, PrimitiveTable, int, Segments], None]
"""transform_input(x, table, row, segments): x (rows, in), dense, changed in place for the target of
table row ``row``; the segments' weights are not used."""

SpreadRows = Callable[[Tensor, Tensor, int], Tensor]
"""spread_rows(x, chosen, copies): a new (rows + copies n, in), x (rows, in) and below it x[chosen]
as many times; chosen (n,) int64, x dense in its last dimension."""

CollectOutputs = Callable[[Tensor, Tensor, SiteTargets], Tensor]
"""collect_outputs(y, chosen, targets): y (rows + (targets - 1) n, out), contiguous, is changed in
place, y[chosen, columns(t)] = y[rows + (t - 1) n :][: n, columns(t)] for every target t but the
first; returns y[: rows]. No row is in chosen (n,) twice."""
