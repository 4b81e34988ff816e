"""What adapters lower to. The engine knows these; it does not know kinds.

Each primitive is a correction at one place of the base, computed beside the base and never merged
into it. Its device math lives once, in the folder of ``kernels/`` that ``Cell`` comes from: the
tensors of a primitive lie in the device pool, and its cell tells the kernel where.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..layout import BaseLayout

ALIGNMENT_BYTES = 64
"""Every tensor begins at a multiple of this on the device."""


class Primitive(Protocol):
    """A correction at one place of the base."""

    @classmethod
    def num_fields(cls) -> int:
        """Fields of a cell of its table."""
        ...

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """Rows of its table: the places of the base where it can be."""
        ...

    @property
    def row(self) -> int:
        """The table's row of its place."""
        ...

    @property
    def path(self) -> str:
        """Module path of its place."""
        ...

    @property
    def is_sum(self) -> bool:
        """Whether it only adds, so that a request may weight it and add other adapters' sums."""
        ...

    @property
    def inner_size(self) -> int:
        """Width of what a kernel keeps for a row between two products, 0 where there is one."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it stores: numbers in the base's dtype, indices as int32.

        One tensor object that several primitives store lies on the device once.
        """
        ...

    def cell(self, offsets: Sequence[int]) -> tuple[int, ...]:
        """The fields of its cell, given where each of ``tensors`` begins, in elements."""
        ...


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those of the tensors that are there."""
    return tuple(tensor for tensor in tensors if tensor is not None)


def spread(offsets: Sequence[int], *tensors: Tensor | None) -> tuple[int, ...]:
    """The offsets of the tensors that are there, -1 for the others."""
    following = iter(offsets)
    return tuple(-1 if tensor is None else next(following) for tensor in tensors)
