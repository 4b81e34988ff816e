"""The frozen base as lowering sees it: its layout, its weights as served, and a forward pass.

Some adapters cannot be lowered without it: DoRA needs the norms of the base's rows, a soft prompt
the keys and values that the base gives it. Everything here happens when an adapter is loaded.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .layout import BaseLayout, EmbeddingSite, LinearTarget, NormSite


class Affine(NamedTuple):
    """Weight and bias of a module, the bias None where it has none."""

    weight: Tensor
    bias: Tensor | None


class PrefixKV(NamedTuple):
    """Keys and values of a prefix of every layer, each (layers, kv_heads, length, head_dim)."""

    keys: Tensor
    values: Tensor


class Base(Protocol):
    """One served base model. Tensors come in ``dtype``, on the CPU; they are not to be changed."""

    @property
    def layout(self) -> BaseLayout:
        """Its places."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it is served in."""
        ...

    def linear(self, target: LinearTarget) -> Affine:
        """Weight (out, in), also of modules that store it transposed, and bias (out,)."""
        ...

    def embedding(self, site: EmbeddingSite) -> Tensor:
        """Rows (num_embeddings, size)."""
        ...

    def norm(self, site: NormSite) -> Affine:
        """Weight (size,) and bias (size,)."""
        ...

    def encode(self, embeddings: Tensor) -> PrefixKV:
        """Keys and values that the bare base computes for rows (length, hidden) in the place of
        token embeddings, at the positions 0, 1, ...
        """
        ...
