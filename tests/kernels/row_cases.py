"""The row corrections of ``test_row_corrections.py`` over random rows, adapters and strides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamux.kernels.backend import Backend
from deltamux.kernels.bottleneck import op as bottleneck
from deltamux.kernels.bottleneck.op import Activation, Source
from deltamux.kernels.embedding import op as embedding
from deltamux.kernels.norm_override import op as norm_override
from deltamux.kernels.side_attention import op as side_attention
from deltamux.kernels.tables import PrimitiveTable, Segments

from .pools import FIRST, NAN, Pool, segments_of

Group = tuple[int, int, int, float]  # first row, one past the last, slot, weight

PLACE = FIRST
EPS = 1e-5
SLOTS = 5
EMPTY = 2
GROUPS = ((0, 1, 0, 1.0), (1, 4, 1, 0.5), (6, 40, 3, 1.0), (40, 40, 4, 1.0), (40, 43, 4, -1.5))
ROWS = 45
OUTSIDE = [4, 5, 43, 44]  # rows in no segment


class RandomPool(Pool):
    """A pool that draws what it stores."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.rng = torch.Generator().manual_seed(0)

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng).to(self.dtype)

    def random(self, *shape: int, scale: float = 1.0) -> int:
        """-> where it begins."""
        return self.put((torch.randn(shape, generator=self.rng) * scale).to(self.dtype))

    def cells(self, make: Callable[[int], Sequence[int]]) -> PrimitiveTable:
        """One place; slot EMPTY has no cell there."""
        cells = {(0, slot): make(slot) for slot in range(SLOTS) if slot != EMPTY}
        return self.table(1, SLOTS, cells)


Apply = Callable[[Backend, Tensor, Sequence[Tensor], PrimitiveTable, Segments], None]


@dataclass(frozen=True)
class Case:
    """One operation over ROWS rows: apply(backend, out, inputs, table, segments) changes out."""

    out: Tensor
    inputs: tuple[Tensor, ...]
    table: PrimitiveTable
    apply: Apply

    def run(self, backend: Backend, groups: Sequence[Group] = GROUPS) -> Tensor:
        out = self.out.clone()
        self.apply(backend, out, self.inputs, self.table, segments_of(groups))
        return out

    def rows(self, rows: slice) -> "Case":
        return replace(self, out=self.out[rows], inputs=tuple(each[rows] for each in self.inputs))

    def wide(self) -> "Case":
        """The same numbers in float32: what the reference computes is then exact."""
        numbers = self.table.numbers.float()
        return replace(
            self,
            out=self.out.float(),
            inputs=tuple(i.float() if i.is_floating_point() else i for i in self.inputs),
            table=replace(self.table, numbers=numbers),
        )


def numbers(case: Case, offset: int, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return case.table.numbers[offset : offset + count].view(shape)


def bottleneck_case(
    dtype: torch.dtype,
    hidden: int = 33,
    width: int = 7,
    activation: Activation = Activation.GELU,
    source: Source = Source.OUTPUT,
) -> Case:
    pool = RandomPool(dtype)

    def cell(slot: int) -> bottleneck.Cell:
        down = pool.random(width, hidden, scale=2 * hidden**-0.5)
        up = pool.random(width, hidden, scale=width**-0.5)
        down_bias = pool.random(width) if slot % 2 else -1
        up_bias = pool.random(hidden) if slot in (0, 1) else -1
        return bottleneck.Cell(width, activation, source, down, up, down_bias, up_bias)

    table = pool.cells(cell)
    return Case(
        pool.rows(ROWS, hidden),
        (pool.rows(ROWS, hidden), pool.rows(ROWS, hidden)),
        table,
        lambda backend, out, inputs, table, segments: backend.deltas.add_bottleneck(
            out, *inputs, table, PLACE, segments
        ),
    )


def side_case(
    dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, head_dim: int = 20, length: int = 11
) -> Case:
    pool = RandomPool(dtype)

    def cell(slot: int) -> side_attention.Cell:
        keys = length + slot
        at = (pool.random(kv_heads, keys, head_dim) for _ in range(2))
        return side_attention.Cell(keys, *at)

    table = pool.cells(cell)
    wide = torch.full((ROWS, heads + 3, head_dim), NAN, dtype=dtype)
    wide[:, 1:-2] = pool.rows(ROWS, heads, head_dim) * 2
    return Case(
        pool.rows(ROWS, heads, head_dim),
        (wide[:, 1:-2],),
        table,
        lambda backend, out, inputs, table, segments: backend.deltas.add_side_attention(
            out, *inputs, table, PLACE, segments, kv_heads, head_dim**-0.5
        ),
    )


def norm_case(
    dtype: torch.dtype, shape: tuple[int, ...] = (33,), centered: bool = False, bias: bool = True
) -> Case:
    pool = RandomPool(dtype)
    size = shape[-1]

    def cell(slot: int) -> norm_override.Cell:
        return norm_override.Cell(pool.random(size), pool.random(size) if bias else -1)

    table = pool.cells(cell)
    wide = torch.full((ROWS, shape[0] + 5, *shape[1:]), NAN, dtype=dtype)
    x = wide[:, 3 : 3 + shape[0]]
    x.copy_(pool.rows(ROWS, *shape) * 3 + 1)
    return Case(
        pool.rows(ROWS, *shape),
        (x,),
        table,
        lambda backend, out, inputs, table, segments: backend.deltas.override_norm(
            out, *inputs, table, PLACE, segments, EPS, centered
        ),
    )


VOCAB = 50


def tokens(pool: RandomPool) -> Tensor:
    return torch.randint(VOCAB, (ROWS,), generator=pool.rng)


def rows_case(dtype: torch.dtype, hidden: int = 33) -> Case:
    """Slot 3 replaces every token's row, the others some: 20, none, 49 of them."""
    pool = RandomPool(dtype)

    def cell(slot: int) -> embedding.RowsCell:
        count = (20, 0, 0, VOCAB, VOCAB - 1)[slot]
        chosen = torch.randperm(VOCAB, generator=pool.rng)[:count].sort().values.int()
        ids = -1 if slot == 3 else pool.put(chosen)
        return embedding.RowsCell(count, pool.random(count, hidden), ids)

    table = pool.cells(cell)
    return Case(
        pool.rows(ROWS, hidden),
        (tokens(pool),),
        table,
        lambda backend, out, inputs, table, segments: backend.deltas.replace_rows(
            out, *inputs, table, PLACE, segments
        ),
    )


def embedding_case(dtype: torch.dtype, hidden: int = 33, rank: int = 5) -> Case:
    """Slot 1 only scales; slot 3 does both."""
    pool = RandomPool(dtype)

    def cell(slot: int) -> embedding.AffineCell:
        scale = pool.random(hidden) if slot in (1, 3) else -1
        if slot == 1:
            return embedding.AffineCell(0, scale=scale)
        a, b = pool.random(VOCAB, rank), pool.random(rank, hidden)
        return embedding.AffineCell(rank, VOCAB, a, b, scale)

    table = pool.cells(cell)
    return Case(
        pool.rows(ROWS, hidden),
        (tokens(pool),),
        table,
        lambda backend, out, inputs, table, segments: backend.deltas.correct_embedding(
            out, *inputs, table, PLACE, segments
        ),
    )


def centered_case(dtype: torch.dtype) -> Case:
    return norm_case(dtype, centered=True)


def heads_case(dtype: torch.dtype) -> Case:
    return norm_case(dtype, (3, 20), bias=False)


def sum_case(dtype: torch.dtype) -> Case:
    return bottleneck_case(dtype, source=Source.SUM)


ACT_NAMES = (
    *((Activation.LINEAR, "linear"), (Activation.RELU, "relu"), (Activation.SILU, "silu")),
    *((Activation.GELU, "gelu"), (Activation.GELU_TANH, "gelu_new")),
    *((Activation.GELU_TANH, "gelu_pytorch_tanh"), (Activation.TANH, "tanh")),
    *((Activation.SIGMOID, "sigmoid"), (Activation.LEAKY_RELU, "leaky_relu")),
    *((Activation.GELU_QUICK, "quick_gelu"), (Activation.RELU6, "relu6")),
    (Activation.RELU_SQUARED, "relu2"),
)
"""The activations by transformers' names."""

MakeCase = Callable[[torch.dtype], Case]
EVERY: tuple[MakeCase, ...] = (
    *(bottleneck_case, sum_case, side_case, norm_case, centered_case, heads_case),
    *(rows_case, embedding_case),
)
