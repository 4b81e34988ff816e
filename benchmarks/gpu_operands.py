"""Operands at the sizes of a real base, on a device: adapters of random numbers in one pool.

The numbers are drawn once, and an adapter's tensors are places among them: nothing is copied. Where
more are asked for than there are, places are given out again from the beginning; so many bytes lie
between two uses of one place that no cache remembers it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.affine.op import Cell as AffineCell
from ..kernels.circulant.op import Cell as CirculantCell
from ..kernels.dense.op import Cell as DenseCell
from ..kernels.gpu.shapes import Shapes
from ..kernels.kronecker.op import Cell as KroneckerCell
from ..kernels.output_rows.op import Cell as OutputRowsCell
from ..kernels.paged_attention.op import PagedBatch
from ..kernels.sparse.op import Cell as SparseCell
from ..kernels.tables import PrimitiveTable, Segments, SiteTargets

BLOCK = 16
"""Tokens of a cache block."""

_ALIGNMENT_BYTES = 64
_STD = 0.05


class Operands:
    """Random tensors on a device.

    Args:
        number_bytes: Of the pool's numbers.
        index_bytes: Of its indices, which lie before them.
        dtype: Of numbers and rows.
        device: Where they are.
        seed: Of all that is drawn.
    """

    def __init__(
        self,
        number_bytes: int,
        index_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        """Draw the pool's numbers."""
        self.dtype = dtype
        self.device = device
        self._rng = torch.Generator(device).manual_seed(seed)
        self._words = torch.zeros(
            (index_bytes + number_bytes) // 4, dtype=torch.int32, device=device
        )
        self._first = index_bytes
        self._words.view(dtype)[index_bytes // dtype.itemsize :].normal_(
            std=_STD, generator=self._rng
        )
        self.reset()

    def reset(self) -> None:
        """Give out all places again."""
        self._next_index, self._next_number = 0, self._first
        self.taken_bytes = 0
        """Of the adapters' tensors since then."""

    def numbers(self, *shape: int) -> int:
        """Where a tensor of the pool's numbers begins, in elements.

        Raises:
            ValueError: It is larger than the pool.
        """
        num_bytes = math.prod(shape) * self.dtype.itemsize
        if self._next_number + num_bytes > self._words.nbytes:
            self._next_number = self._first
        if self._next_number + num_bytes > self._words.nbytes:
            raise ValueError(f"a tensor of {shape} does not fit the pool")
        start, self._next_number = self._next_number, _after(self._next_number + num_bytes)
        self.taken_bytes += num_bytes
        return start // self.dtype.itemsize

    def indices(self, values: Tensor) -> int:
        """Where a tensor of these indices begins, in elements.

        Raises:
            ValueError: There is no room.
        """
        start, end = self._next_index, self._next_index + 4 * values.numel()
        if end > self._first:
            raise ValueError(f"{values.numel()} more indices do not fit the pool")
        self._words[start // 4 : end // 4] = values.reshape(-1).to(self.device)
        self._next_index = _after(end)
        self.taken_bytes += end - start
        return start // 4

    def table(self, cells: Sequence[Sequence[Sequence[int]]]) -> PrimitiveTable:
        """The table of these cells, by row and adapter slot."""
        placed = torch.tensor(cells, dtype=torch.int64, device=self.device)
        return PrimitiveTable(placed, self._words.view(self.dtype), self._words)

    def rows(self, *shape: int) -> Tensor:
        """Numbers of variance 1."""
        drawn = torch.empty(shape, dtype=self.dtype, device=self.device)
        return drawn.normal_(generator=self._rng)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of the rows' dtype if no other is named."""
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def below(self, end: int, *shape: int) -> Tensor:
        """Whole numbers, int64."""
        return torch.randint(end, shape, generator=self._rng, device=self.device)

    def place(self, array: npt.NDArray[Any]) -> Tensor:
        """An array on the device."""
        return torch.from_numpy(array).to(self.device)

    def segments(
        self, adapters: int, rows_each: int, max_inner: int, bucket: int | None = None
    ) -> Segments:
        """One after another, each of an adapter of its own; of a captured step with a bucket."""
        ranges = [(i * rows_each, (i + 1) * rows_each, i, 1.0) for i in range(adapters)]
        return Segments.of(ranges, max_inner, self.place, bucket, fine=True)


MakeCell = Callable[[Operands, int, int], tuple[int, ...]]
"""make(operands, in_size, out_size): one adapter on one target."""


def affine(rank: int) -> MakeCell:
    """A LoRA."""
    return lambda operands, in_size, out_size: AffineCell(
        rank, operands.numbers(rank, in_size), operands.numbers(rank, out_size)
    )


def dense(operands: Operands, in_size: int, out_size: int) -> DenseCell:
    """A whole matrix."""
    return DenseCell(operands.numbers(out_size, in_size))


def sparse(per_row: int) -> MakeCell:
    """As many entries in every row, at random columns."""

    def make(operands: Operands, in_size: int, out_size: int) -> SparseCell:
        entries = per_row * out_size
        starts = torch.arange(0, entries + 1, per_row)
        columns = operands.below(in_size, out_size, per_row).sort().values
        return SparseCell(
            entries,
            operands.indices(starts),
            operands.indices(columns),
            operands.numbers(entries),
        )

    return make


def kronecker(rank: int) -> MakeCell:
    """L and R as nearly square as they can be, R whole where the rank is 0."""

    def make(operands: Operands, in_size: int, out_size: int) -> KroneckerCell:
        left_rows, left_columns = largest_divisor(out_size), largest_divisor(in_size)
        k, n = out_size // left_rows, in_size // left_columns
        left = operands.numbers(left_rows, left_columns)
        if rank == 0:
            return KroneckerCell(left_rows, left_columns, 0, left, operands.numbers(k, n))
        down, up = operands.numbers(rank, n), operands.numbers(k, rank)
        return KroneckerCell(left_rows, left_columns, rank, left, down, up)

    return make


def kronecker_inner(in_size: int, out_size: int) -> int:
    """Numbers that such a product keeps of a row between its two halves."""
    return largest_divisor(in_size) * (out_size // largest_divisor(out_size))


def circulant(block: int) -> MakeCell:
    """Blocks of one size, or of the largest that divides both widths."""

    def make(operands: Operands, in_size: int, out_size: int) -> CirculantCell:
        b = math.gcd(block, in_size, out_size)
        return CirculantCell(b, operands.numbers(out_size // b, in_size // b, b))

    return make


def output_rows(count: int) -> MakeCell:
    """So many rows of a weight, far from each other."""

    def make(operands: Operands, in_size: int, out_size: int) -> OutputRowsCell:
        rows = torch.arange(0, out_size, -(-out_size // count))
        weight = operands.numbers(len(rows), in_size)
        return OutputRowsCell(len(rows), operands.indices(rows), weight)

    return make


def largest_divisor(size: int) -> int:
    """The largest one up to the square root."""
    return next(each for each in range(math.isqrt(size), 0, -1) if size % each == 0)


@dataclass(frozen=True, slots=True)
class SiteOperands:
    """What a correction of one linear site takes, of ``tables.CorrectLinear``."""

    y: Tensor
    x: Tensor
    table: PrimitiveTable
    targets: SiteTargets
    segments: Segments


def site_operands(
    operands: Operands,
    make: MakeCell,
    in_size: int,
    out_sizes: Sequence[int],
    segments: Segments,
    dtype: torch.dtype | None = None,
    adapters: int | None = None,
) -> SiteOperands:
    """Every adapter of the segments corrects every target; y is zero, so that only they show.

    There are as many ``adapters`` as segments if nothing else is said: a captured step has segments
    of none.
    """
    adapters = adapters or segments.start.shape[0]
    rows = segments.rows.shape[0]
    cells = [[make(operands, in_size, out) for _ in range(adapters)] for out in out_sizes]
    starts = tuple(accumulate(out_sizes[:-1], initial=0))
    return SiteOperands(
        y=operands.zeros(rows, sum(out_sizes), dtype=dtype),
        x=operands.rows(rows, in_size).to(dtype or operands.dtype),
        table=operands.table(cells),
        targets=SiteTargets(0, starts, tuple(out_sizes)),
        segments=segments,
    )


@dataclass(frozen=True, slots=True)
class PagedOperands:
    """What attention takes, of equal sequences over shuffled cache blocks."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    batch: PagedBatch
    scale: float


def paged_operands(
    operands: Operands, shapes: Shapes, sequences: int, q_len: int, context: int
) -> PagedOperands:
    """``q_len`` query rows of each sequence, whose keys end with theirs."""
    per_sequence = -(-context // BLOCK)
    blocks = sequences * per_sequence
    cache = (blocks, shapes.kv_heads, BLOCK, shapes.head_dim)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks))
    tables = order.view(sequences, per_sequence)
    keys = torch.arange(context - q_len, context)
    slots = tables[:, keys // BLOCK] * BLOCK + keys % BLOCK

    def index(values: Tensor) -> Tensor:
        return values.to(operands.device, torch.int32)

    return PagedOperands(
        query=operands.rows(sequences * q_len, shapes.heads, shapes.head_dim),
        key_cache=operands.rows(*cache),
        value_cache=operands.rows(*cache),
        batch=PagedBatch(
            cu_seqlens_q=index(torch.arange(0, (sequences + 1) * q_len, q_len)),
            context_starts=index(torch.zeros(sequences)),
            context_lens=index(torch.full((sequences,), context)),
            block_tables=index(tables),
            slot_mapping=slots.reshape(-1).to(operands.device),
            max_seqlen_q=q_len,
            max_context_len=context,
        ),
        scale=shapes.head_dim**-0.5,
    )


def _after(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
