"""Root-mean-square normalisation, alone or with the residual addition that comes before it.

    y = weight * x / sqrt(mean(x^2) + eps)          (arXiv:1910.07467)

computed in float32, rounded to the dtype of x once after the division and once after the product
with the weight: the order of transformers' ``LlamaRMSNorm``.
"""

from collections.abc import Callable

from torch import Tensor

RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
"""rms_norm(x, weight, eps): x (rows, size) or (rows, heads, size), its last dimension contiguous
and the others possibly strided; weight (size,) of the same dtype -> a new contiguous y of x's
shape."""

AddRMSNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""add_rms_norm(x, residual, weight, eps): residual += x in place, rounded once, then
-> rms_norm(residual, weight, eps). x and residual are (rows, size)."""
