"""Factorizations that turn structured differences into the primitives' plain ones."""

import torch
from torch import Tensor


def khatri_rao(first: Tensor, second: Tensor) -> Tensor:
    """Every product of a row of one with a row of the other.

    (A B) * (C D), elementwise, is khatri_rao(Aᵀ, Cᵀ)ᵀ khatri_rao(B, D).

    Args:
        first: (r, width).
        second: (q, width).

    Returns:
        (r q, width): row i q + j is first[i] * second[j].
    """
    return (first[:, None, :] * second[None, :, :]).flatten(0, 1)


def skew_symmetric(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (n, size, size) from their strict upper triangles by rows.

    Args:
        upper: (n, size (size - 1) / 2).
        size: Of each matrix.
    """
    rows, columns = torch.triu_indices(size, size, 1)
    matrices = upper.new_zeros(upper.shape[0], size, size)
    matrices[:, rows, columns] = upper
    return matrices - matrices.mT


def cayley(skew: Tensor) -> Tensor:
    """(I - S) (I + S)^-1, orthogonal for skew-symmetric S (n, b, b)."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    solved: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return solved


def householder_product(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """H_1 H_2 ... H_r = I - U Z with H_i = I - 2 u_i u_iᵀ, for unit vectors u_i.

    The compact WY form (Schreiber and Van Loan 1989): Z = T Uᵀ with T upper triangular and
    T^-1 = I / 2 + (the strict upper triangle of Uᵀ U).

    Args:
        vectors: U (width, r), its columns of length 1.

    Returns:
        U (width, r) and Z (r, width).
    """
    gram = torch.triu(vectors.T @ vectors, diagonal=1)
    inverse = gram + torch.eye(vectors.shape[1], dtype=vectors.dtype) / 2
    return vectors, torch.linalg.solve_triangular(inverse, vectors.T.contiguous(), upper=True)


def csr(rows: Tensor, columns: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """A sparse matrix by rows; entries at the same place add up.

    Args:
        rows: (entries,) int64 row of each entry, below ``num_rows``.
        columns: (entries,) int64.
        values: (entries,).
        num_rows: Of the matrix.

    Returns:
        ``row_starts`` (num_rows + 1,) int32, ``columns`` int32 and ``values``, by rows and columns.
    """
    width = int(columns.max()) + 1
    places, which = torch.unique(rows * width + columns, return_inverse=True)
    summed = values.new_zeros(len(places)).index_add_(0, which, values)
    ends = torch.bincount(places // width, minlength=num_rows).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    return starts.to(torch.int32), (places % width).to(torch.int32), summed
