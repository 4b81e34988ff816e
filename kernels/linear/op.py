"""The frozen base's matrix products; what can be prepared is done when a weight is loaded.

    y = x Wᵀ + b

The weights never change, so a backend may keep them in the layout its kernel reads fastest.
"""

from collections.abc import Callable

from torch import Tensor

LinearOp = Callable[[Tensor], Tensor]
"""x (rows, in), contiguous -> a new contiguous (rows, out) in the dtype of x."""

PrepareLinear = Callable[[Tensor, Tensor | None], LinearOp]
"""prepare_linear(weight, bias): weight (out, in), bias (out,) or None -> their product with x. The
weight itself need not be kept."""
