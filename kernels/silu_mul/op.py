"""The gated activation between the two GEMMs of a Llama-style MLP.

    y = silu(gate) * up,    silu(z) = z / (1 + exp(-z))        (SwiGLU, arXiv:2002.05202)

in float32, rounded once.
"""

from collections.abc import Callable

from torch import Tensor

SiluMul = Callable[[Tensor], Tensor]
"""silu_mul(gate_up): (rows, 2 * size), gate in the first ``size`` columns and up in the others
-> a new contiguous (rows, size)."""
