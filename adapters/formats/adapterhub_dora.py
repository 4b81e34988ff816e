"""The magnitude that AdapterHub's DoRA and DVoRA give a module (arXiv:2402.09353).

    y = g * (W x + b + s D x),   g_i = m_i / ‖(W + D)_i‖

over the rows i, with D the product of the trained matrices. Other than in the paper and in PEFT,
the base's bias is scaled too, and the norm is of D without s. Both are what the library computes.
"""

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterUnsupported, shown
from ..layout import LinearTarget
from ..primitives.linear import Affine
from .binding import cast


def magnitude_affine(
    base: Base,
    target: LinearTarget,
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    *,
    stored_a: Tensor | None = None,
) -> Affine:
    """The module's correction.

    Args:
        base: The served base.
        target: The module.
        a: (rank, in).
        b: (out, rank), D = b a, without ``scale``.
        scale: s.
        magnitude: m (out,).
        stored_a: ``a`` in the base's dtype, where another module stores it already.

    Raises:
        AdapterUnsupported: The module stores its weight transposed, on which the library fails; or
            a row of W + D is zero.
    """
    if target.is_transposed:
        raise AdapterUnsupported(
            f"{shown(target.path)} is a Conv1D, on which the library's own DoRA fails: train it "
            f"without use_dora"
        )
    whole = base.linear(target).weight.float() + b.float() @ a.float()
    norm = torch.linalg.vector_norm(whole, dim=1)
    if not bool(norm.all()):
        raise AdapterUnsupported(f"{shown(target.path)} has a row of length zero, to be divided by")
    g = magnitude.float() / norm
    return Affine(
        target,
        a=cast(target.path, a, base.dtype) if stored_a is None else stored_a,
        b=cast(target.path, (b.float() * (scale * g)[:, None]).T, base.dtype),
        scale=cast(target.path, g, base.dtype),
    )
