"""Block-circulant differences (C3A, arXiv:2407.19342), never expanded; a ``tables.CorrectLinear``.

With blocks of b, x in in/b of them and y in out/b,

    y_m[p] += w sum_n sum_q K[m, n, (q - p) mod b] x_n[q].
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One adapter on one target.

    Attributes:
        block: b, which divides in and out.
        kernel: Offset of K (out / b, in / b, b), every scale folded in.
    """

    block: int
    kernel: int
