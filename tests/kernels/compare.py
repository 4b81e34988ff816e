"""How close a kernel must come to the float32 formula on the same inputs."""

import torch
from torch import Tensor


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor | float | None = None) -> None:
    """Within 1e-5 of the terms' magnitude; of 16 bits, and one rounding of the result.

    ``magnitude`` bounds the sum of the absolute terms, against which summation order shows.
    """
    assert torch.isfinite(actual).all()
    scale = exact.abs() if magnitude is None else torch.as_tensor(magnitude)
    allowed = 1e-5 * scale + 1e-6
    if actual.dtype is torch.bfloat16:
        allowed = allowed + 2.0**-8 * exact.abs()
    if actual.dtype is torch.float16:
        allowed = allowed + 2.0**-11 * exact.abs()
    excess = (actual.float() - exact).abs() - allowed
    assert excess.max() <= 0, f"largest excess {excess.max()} over the tolerance"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as raw memory, so that a NaN equals itself."""
    bits = torch.int32 if a.dtype is torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
