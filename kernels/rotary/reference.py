"""The formula of ``op`` in plain torch: the oracle of every faster version."""

import torch
from torch import Tensor


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate query and key in place; see ``op``."""
    for heads in (query, key):
        _rotate(heads, cos[:, None], sin[:, None])


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    first, second = heads.float().chunk(2, dim=-1)
    heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
