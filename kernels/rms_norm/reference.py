"""The formula of ``op`` in plain torch: the oracle of every faster version."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Y = weight * x / sqrt(mean(x^2) + eps) over the last dimension; see ``op``."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to the residual in place and normalise the sum."""
    residual += x
    return rms_norm(residual, weight, eps)
