"""Corrections of embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...kernels.embedding import op as embedding
from ..layout import BaseLayout, EmbeddingSite
from .primitive import present, spread


@dataclass(frozen=True)
class _OnEmbedding:
    """At an embedding.

    Attributes:
        site: The embedding.
    """

    site: EmbeddingSite

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """One row an embedding."""
        return len(layout.embeddings)

    @property
    def row(self) -> int:
        """The embedding's index."""
        return self.site.index

    @property
    def path(self) -> str:
        """The embedding's path."""
        return self.site.path

    @property
    def inner_size(self) -> int:
        """A row of A is read, not computed."""
        return 0


@dataclass(frozen=True)
class EmbeddingRows(_OnEmbedding):
    """Some or all rows of an embedding are replaced.

    Attributes:
        rows: (count, size).
        ids: (count,) int32, ascending; None where every row is given.
    """

    rows: Tensor
    ids: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(embedding.RowsCell._fields)

    @property
    def is_sum(self) -> bool:
        """It replaces."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Rows, and ids where there are."""
        return present(self.rows, self.ids)

    def cell(self, offsets: Sequence[int]) -> embedding.RowsCell:
        """See ``Primitive``."""
        return embedding.RowsCell(self.rows.shape[0], *spread(offsets, self.rows, self.ids))


@dataclass(frozen=True)
class EmbeddingAffine(_OnEmbedding):
    """x = g * x + A[token] B at an embedding.

    Attributes:
        a: A (num_embeddings, rank): the checkpoint's A transposed.
        b: B (rank, size), multiplied by the adapter's scale.
        scale: g (size,).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(embedding.AffineCell._fields)

    @property
    def is_sum(self) -> bool:
        """Unless it scales the base's rows."""
        return self.scale is None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A, B and g, as far as they are there."""
        return present(self.a, self.b, self.scale)

    def cell(self, offsets: Sequence[int]) -> embedding.AffineCell:
        """See ``Primitive``."""
        num_tokens, rank = (-1, 0) if self.a is None else self.a.shape
        return embedding.AffineCell(rank, num_tokens, *spread(offsets, self.a, self.b, self.scale))
