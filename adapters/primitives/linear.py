"""Corrections of linear modules."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...kernels.affine import op as affine
from ...kernels.circulant import op as circulant
from ...kernels.dense import op as dense
from ...kernels.input_transform import op as input_transform
from ...kernels.kronecker import op as kronecker
from ...kernels.output_rows import op as output_rows
from ...kernels.sparse import op as sparse
from ...kernels.spectral import op as spectral
from ..layout import BaseLayout, LinearTarget
from .primitive import present, spread


@dataclass(frozen=True)
class _OnTarget:
    """At a linear target.

    Attributes:
        target: The linear module.
    """

    target: LinearTarget

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """One row a target."""
        return layout.num_targets

    @property
    def row(self) -> int:
        """The target's index."""
        return self.target.index

    @property
    def path(self) -> str:
        """The target's path."""
        return self.target.path

    @property
    def is_sum(self) -> bool:
        """Most corrections of a linear module are."""
        return True

    @property
    def inner_size(self) -> int:
        """Most are one product."""
        return 0


@dataclass(frozen=True)
class Affine(_OnTarget):
    """y = g * y + (x Aᵀ) B + c on one target; see ``kernels/affine/op.py``.

    Attributes:
        a: (rank, in_features), None without a low-rank part.
        b: (rank, out_features): the checkpoint's B transposed, so that a rank row is contiguous in
            both factors, and multiplied by the adapter's scale.
        bias: c (out_features,).
        scale: g (out_features,).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(affine.Cell._fields)

    @property
    def rank(self) -> int:
        """Rows of A and of B."""
        return 0 if self.a is None else self.a.shape[0]

    @property
    def inner_size(self) -> int:
        """The rank."""
        return self.rank

    @property
    def is_sum(self) -> bool:
        """Unless it scales the base's output."""
        return self.scale is None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A, B, c and g, as far as they are there."""
        return present(self.a, self.b, self.bias, self.scale)

    def cell(self, offsets: Sequence[int]) -> affine.Cell:
        """See ``Primitive``."""
        a, b, bias, scale = spread(offsets, self.a, self.b, self.bias, self.scale)
        return affine.Cell(self.rank, a, b, bias, scale)


@dataclass(frozen=True)
class Dense(_OnTarget):
    """y += x Dᵀ on one target, D (out_features, in_features)."""

    weight: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(dense.Cell._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """D."""
        return (self.weight,)

    def cell(self, offsets: Sequence[int]) -> dense.Cell:
        """See ``Primitive``."""
        return dense.Cell(*offsets)


@dataclass(frozen=True)
class Sparse(_OnTarget):
    """y += x Sᵀ on one target, S (out_features, in_features) by rows (CSR).

    Attributes:
        row_starts: (out_features + 1,) int32.
        columns: (entries,) int32.
        values: (entries,).
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(sparse.Cell._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Row starts, columns, values."""
        return (self.row_starts, self.columns, self.values)

    def cell(self, offsets: Sequence[int]) -> sparse.Cell:
        """See ``Primitive``."""
        return sparse.Cell(self.values.numel(), *offsets)


@dataclass(frozen=True)
class Spectral(Sparse):
    """y += Re(ifft2(S)) x on one target: S as in ``Sparse``, but of frequencies."""

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(spectral.Cell._fields)


@dataclass(frozen=True)
class Kronecker(_OnTarget):
    """y += kron(L, R) x on one target; see ``kernels/kronecker/op.py``.

    Attributes:
        left: L (l, m).
        right: R (k, n), or D (rank, n) where R = U D.
        up: U (k, rank), or None.
    """

    left: Tensor
    right: Tensor
    up: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(kronecker.Cell._fields)

    @property
    def inner_size(self) -> int:
        """X Rᵀ, (m, k)."""
        return self.left.shape[1] * (self.right if self.up is None else self.up).shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """L, then R or D and U."""
        return present(self.left, self.right, self.up)

    def cell(self, offsets: Sequence[int]) -> kronecker.Cell:
        """See ``Primitive``."""
        rows, columns = self.left.shape
        rank = 0 if self.up is None else self.right.shape[0]
        return kronecker.Cell(rows, columns, rank, *spread(offsets, self.left, self.right, self.up))


@dataclass(frozen=True)
class Circulant(_OnTarget):
    """Block-circulant difference on one target; see ``kernels/circulant/op.py``.

    Attributes:
        kernel: K (out_features / b, in_features / b, b).
    """

    kernel: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(circulant.Cell._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """K."""
        return (self.kernel,)

    def cell(self, offsets: Sequence[int]) -> circulant.Cell:
        """See ``Primitive``."""
        return circulant.Cell(self.kernel.shape[2], *offsets)


@dataclass(frozen=True)
class OutputRows(_OnTarget):
    """y[index_k] = x . W_k on one target, for heads with trained tokens.

    Attributes:
        indices: (count,) int32, ascending.
        weight: W (count, in_features).
    """

    indices: Tensor
    weight: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(output_rows.Cell._fields)

    @property
    def is_sum(self) -> bool:
        """It replaces."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Indices and W."""
        return (self.indices, self.weight)

    def cell(self, offsets: Sequence[int]) -> output_rows.Cell:
        """See ``Primitive``."""
        return output_rows.Cell(self.indices.numel(), *offsets)


@dataclass(frozen=True)
class InputTransform(_OnTarget):
    """The target reads s * x, rotated; see ``kernels/input_transform/op.py``. A still sees x.

    Attributes:
        scale: s (in_features,).
        rotations: R (stages, blocks or 1, b, b).
        permutations: p (stages, in_features) int32.
    """

    scale: Tensor | None = None
    rotations: Tensor | None = None
    permutations: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(input_transform.Cell._fields)

    @property
    def is_sum(self) -> bool:
        """It changes what the base multiplies."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """R, p and s, as far as they are there."""
        return present(self.rotations, self.permutations, self.scale)

    def cell(self, offsets: Sequence[int]) -> input_transform.Cell:
        """See ``Primitive``."""
        stages, blocks, block = (0, 0, 0) if self.rotations is None else self.rotations.shape[:3]
        at = spread(offsets, self.rotations, self.permutations, self.scale)
        return input_transform.Cell(stages, blocks, block, *at)
