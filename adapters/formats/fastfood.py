"""Fastfood (Le, Sarlós and Smola, 2013): a random projection without its matrix.

    p(θ) = [H G Π H B θ']_{:D} / sqrt(D ΣG²),   L = 2^ceil(log2 D),

with θ' = θ padded with zeros, or cut, to L numbers, B a diagonal of signs, Π a permutation,
(Π x)_i = x_{Π_i}, G a diagonal of normal numbers, and H the Hadamard matrix of entries ±1, applied
in L log2 L steps. The formula is that of the intrinsic-dimension papers (arXiv:1804.08838,
arXiv:2012.13255).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fastfood:
    """One projection.

    Attributes:
        signs: The diagonal of B (L,), L a power of two.
        permutation: Π (L,), integers.
        gaussian: The diagonal of G (L,).
    """

    signs: Tensor
    permutation: Tensor
    gaussian: Tensor

    @classmethod
    def draw(cls, length: int, generator: torch.Generator) -> "Fastfood":
        """A random projection of L = ``length``; this order of draws is part of the file format."""
        return cls(
            signs=torch.randint(0, 2, (length,), dtype=torch.int8, generator=generator) * 2 - 1,
            permutation=torch.randperm(length, dtype=torch.int32, generator=generator),
            gaussian=torch.randn(length, generator=generator),
        )

    def project(self, theta: Tensor, count: int) -> Tensor:
        """p(θ) (count,) in float32 for θ (d,), L / 2 < count <= L."""
        length = len(self.signs)
        x = torch.zeros(length)
        used = min(length, len(theta))
        x[:used] = theta[:used]
        walsh_hadamard(x.mul_(self.signs))
        gaussian = self.gaussian.float()
        x = x[self.permutation].mul_(gaussian)
        walsh_hadamard(x)
        squares = float(gaussian.double().square().sum())
        return x[:count].div_(math.sqrt(count * squares))


def padded_length(count: int) -> int:
    """L for D = ``count`` numbers."""
    return 1 << (count - 1).bit_length()


def walsh_hadamard(x: Tensor) -> None:
    """x = H x in place, for x (2^k,) dense; H by Sylvester's construction, not normalised."""
    half = 1
    while half < len(x):
        low, high = x.view(-1, 2, half).unbind(1)
        difference = low - high
        low += high
        high.copy_(difference)
        half *= 2
