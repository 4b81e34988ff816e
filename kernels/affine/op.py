"""Batched affine low-rank corrections: each row of a batch gets its own adapter's.

    y[i:j, columns(t)] = g(t, s) * y[i:j, columns(t)] + w ((x[i:j] A(t, s)ᵀ) B(t, s) + c(t, s))

for every segment (i, j, s, w) of rows that share adapter slot s, and every target t of a site.
Ranks are exact: a segment reads the rank rows of its A and B and nothing else. Punica
(arXiv:2310.18547) named the two halves shrink and expand; S-LoRA (arXiv:2311.03285) showed that
unpadded ranks in one pool are enough. The op is a ``tables.CorrectLinear``.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One adapter on one target.

    Attributes:
        rank: Rows of A and B; 0 without them.
        a: Offset of A (rank, in).
        b: Offset of B (rank, out), the checkpoint's B transposed.
        bias: Offset of c (out,).
        scale: Offset of g (out,), which is not multiplied by the weight w.
    """

    rank: int
    a: int = -1
    b: int = -1
    bias: int = -1
    scale: int = -1
