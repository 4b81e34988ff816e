"""What LoRA's variants need to know of a base weight: parts of it that PEFT takes out, and norms.

PiSSA, OLoRA and KaSA train beside a base that lacks a part P of W. Beside the whole W they compute
the same once P is subtracted, and P = L R has a low rank. Each part is a projection of W, so signs
and bases of its factors, which differ from one machine to the next, cancel in L R.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 22


def principal_part(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r S_r V_rᵀ of the ``rank`` largest singular values of W (PiSSA, arXiv:2404.02948)."""
    return _singular_part(weight, slice(-rank, None))


def minor_part(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U S Vᵀ of the ``rank`` smallest singular values of W (KaSA, arXiv:2412.06071)."""
    return _singular_part(weight, slice(rank))


def leading_part(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q_r R_r of W = Q R (OLoRA, arXiv:2406.01775); the columns of Q_r span the first of W."""
    wide = weight.double()
    basis = torch.linalg.qr(wide[:, :rank]).Q
    return basis.float(), (basis.T @ wide).float()


@dataclass(frozen=True, slots=True)
class RemovedPart:
    """A part of W that PEFT takes out before it trains.

    Attributes:
        name: The value or field that asks for it.
        find: (W (out, in), r) -> L (out, r) and R (r, in) with P = L R, both in float32.
        is_scaled: Whether the adapter's scale times P is taken out.
        leaves_some: Whether r has to be smaller than W's sides.
        on_conv1d: Whether PEFT can for GPT-2's ``Conv1D``.
    """

    name: str
    find: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    is_scaled: bool
    leaves_some: bool
    on_conv1d: bool


PISSA = RemovedPart("pissa", principal_part, is_scaled=False, leaves_some=False, on_conv1d=True)
OLORA = RemovedPart("olora", leading_part, is_scaled=True, leaves_some=False, on_conv1d=False)
KASA = RemovedPart("kasa_config", minor_part, is_scaled=False, leaves_some=True, on_conv1d=False)


def row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Lengths (out,) of the rows of W + B A, in float32.

    Args:
        weight: W (out, in), of any dtype.
        a: A (r, in), float32.
        b: B (out, r), float32.
    """
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in _sums(weight, a, b)])


def column_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Lengths (in,) of the columns of W + B A, in float32; arguments as for ``row_norms``."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64)
    for rows in _sums(weight, a, b):
        squares += rows.square().sum(0)
    return squares.sqrt().float()


def _singular_part(weight: Tensor, which: slice) -> tuple[Tensor, Tensor]:
    """The part of some singular values, counted from the smallest.

    The eigenvectors of the smaller of W Wᵀ and Wᵀ W are W's singular vectors. In float64 they are
    as exact as the float32 decomposition that PEFT makes, and cost a fraction of it where W is not
    square.
    """
    wide = weight.double()
    if wide.shape[0] <= wide.shape[1]:
        left = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, which]
        return left.float(), (left.T @ wide).float()
    right = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, which]
    return (wide @ right).float(), right.T.float()


def _sums(weight: Tensor, a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """W + B A in float32, some rows at a time: the whole may be as large as the base's largest."""
    step = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield weight[rows].float() + b[rows] @ a
