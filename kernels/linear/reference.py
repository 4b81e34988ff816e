"""The formulas of ``op`` in plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..tables import SiteTargets


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """``LinearOp`` on the weight as it is.

    Attributes:
        weight: W (out, in).
        bias: b (out,), None without one.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, /) -> Tensor:
        """See ``LinearOp``."""
        return functional.linear(x, self.weight, self.bias)

    def per_target(self, inputs: Tensor, _: Tensor, targets: SiteTargets, /) -> Tensor:
        """See ``LinearOp``."""
        sizes = list(targets.out_sizes)
        weights = self.weight.split(sizes)
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        parts = (
            functional.linear(x, weight, bias)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        return torch.cat(list(parts), dim=1)


def prepare_linear(weight: Tensor, bias: Tensor | None) -> PlainLinear:
    """The weight as it is."""
    return PlainLinear(weight, bias)
