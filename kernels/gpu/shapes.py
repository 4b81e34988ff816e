"""Shapes of bases as they are served: what kernels are compiled for and counted with."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shapes:
    """A Llama-like base.

    Attributes:
        name: As people call its size.
        layers: Of them, all alike.
        hidden: Width of the residual stream.
        inner: Width of the MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Tokens.
        tied_head: Whether head and embedding are one matrix.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_head: bool = False

    @property
    def sites(self) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
        """Name, inputs and the outputs of each target, of a layer's linear sites."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            ("qkv", self.hidden, (queries, keys, keys)),
            ("o", queries, (self.hidden,)),
            ("gate_up", self.hidden, (self.inner, self.inner)),
            ("down", self.inner, (self.hidden,)),
        )


LLAMA_1B = Shapes("1B", 16, 2048, 8192, 32, 8, 64, 128_256, tied_head=True)
LLAMA_8B = Shapes("8B", 32, 4096, 14_336, 32, 8, 128, 128_256)
LLAMA_70B = Shapes("70B", 80, 8192, 28_672, 64, 8, 128, 128_256)
"""Llama 3.2 1B, Llama 3.1 8B and 70B, as their configurations say."""


def shape_only(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
