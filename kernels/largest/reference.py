"""The formula of ``op`` in plain torch."""

from torch import Tensor


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row and its first index."""
    values, indices = x.max(-1)
    return values, indices
