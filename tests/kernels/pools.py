"""Pools in which everything but the tensors is poison, and the tables and segments over them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deltamux.kernels.tables import PrimitiveTable, Segments

NAN = float("nan")
POISON = 0x7FC07FC0  # NaN as float32 and as two bfloat16; far outside of everything as an index
GAP = 5
"""Words of poison behind the last tensor, and at least as many before every one."""
ALIGNED = 16
"""Words in 64 bytes: the product's pool begins every tensor at a multiple; kernels rely on it."""


class Pool:
    """Tensors at multiples of 64 bytes with poison between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._words: list[Tensor] = []
        self._used = 0

    def put(self, tensor: Tensor) -> int:
        """Where it begins, in elements of its own type: int32, or numbers of the pool's dtype."""
        flat = tensor.reshape(-1)
        assert flat.dtype in (torch.int32, self.dtype), "the test would not know what is stored"
        words = torch.full((-(-flat.nbytes // 4),), POISON, dtype=torch.int32)
        words.view(flat.dtype)[: flat.numel()] = flat
        gap = GAP + -(self._used + GAP) % ALIGNED
        self._words += [torch.full((gap,), POISON, dtype=torch.int32), words]
        self._used += gap + words.numel()
        return (self._used - words.numel()) * 4 // flat.element_size()

    def table(
        self, rows: int, slots: int, cells: Mapping[tuple[int, int], Sequence[int]]
    ) -> PrimitiveTable:
        """Two rows of poison, then ``rows``; cells (row, slot) that are not given are empty."""
        fields = max((len(cell) for cell in cells.values()), default=1)
        table = torch.full((FIRST + rows, slots, fields), 1 << 40, dtype=torch.int64)
        table[FIRST:, :, 0] = -1
        for (row, slot), cell in cells.items():
            table[FIRST + row, slot] = torch.tensor(cell)
        words = torch.cat([*self._words, torch.full((GAP,), POISON, dtype=torch.int32)])
        return PrimitiveTable(table, words.view(self.dtype), words)


MAX_INNER = 256
"""Of any adapter in the tests."""

FIRST = 2
"""The first row of a table that is not poison."""


def segments_of(groups: Sequence[tuple[int, int, int, float]]) -> Segments:
    """Of (first row, one past the last, adapter slot, weight) each."""
    return Segments.of(groups, MAX_INNER)


def strided_rows(rows: int, size: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Random (rows, size), a view of a wider buffer of NaN."""
    wide = torch.full((rows, size + 9), NAN, dtype=dtype)
    view = wide[:, 3 : 3 + size]
    view.copy_(torch.randn(rows, size, generator=rng))
    return view


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """torch's threads for the time of a block; with more than one, all else here is slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def poison_outside(x: Tensor, groups: Sequence[tuple[int, int, int, float]]) -> Tensor:
    """Which rows are in a segment; the others of ``x`` become NaN."""
    inside = torch.zeros(len(x), dtype=torch.bool)
    for start, end, _, _ in groups:
        inside[start:end] = True
    x[~inside] = NAN
    return inside
