"""The frozen base's matrix products; what can be prepared is done when a weight is loaded.

    y = x Wᵀ + b

The weights never change, so a backend may keep them in the layout its kernel reads fastest.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..tables import SiteTargets


class LinearOp(Protocol):
    """One product; W holds the weights of its targets, one below the other."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """X (rows, in), contiguous -> a new contiguous (rows, out) in the dtype of x."""
        ...

    def per_target(self, inputs: Tensor, changed: Tensor, targets: SiteTargets, /) -> Tensor:
        """y[:, columns(t)] = inputs[t] W_tᵀ + b_t, every target's columns from an input of its own.

        Args:
            inputs: (targets, rows, in), contiguous; they differ in nothing but the changed rows.
            changed: (n,) int64; no row is named twice.
            targets: Whose columns follow each other and are all of y.

        Returns:
            A new (rows, out), dense in its last dimension.
        """
        ...


PrepareLinear = Callable[[Tensor, Tensor | None], LinearOp]
"""prepare_linear(weight, bias): weight (out, in), bias (out,) or None -> their product with x. The
weight itself need not be kept."""
