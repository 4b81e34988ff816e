"""The formula of ``op`` in plain torch."""

from functools import partial

from torch import Tensor
from torch.nn import functional

from .op import LinearOp


def prepare_linear(weight: Tensor, bias: Tensor | None) -> LinearOp:
    """y = x Wᵀ + b on the weight as it is."""
    return partial(functional.linear, weight=weight, bias=bias)
