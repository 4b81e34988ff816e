"""Whether a tensor holds numbers only: asked of every tensor of every adapter that is read."""

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element of a floating-point tensor is NaN or Inf.

    Those outlive a sum, which takes one operation without a mask. Only where the sum is none are
    the elements looked at: that of large numbers overflows.
    """
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(tensor.isfinite().all())
