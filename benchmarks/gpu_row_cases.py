"""Cases of the corrections away from linear modules: of inputs, embeddings, norms and halves."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.bottleneck import op as bottleneck
from ..kernels.embedding import op as embedding
from ..kernels.gpu.shapes import Shapes
from ..kernels.input_transform import op as input_transform
from ..kernels.norm_override import op as norm_override
from ..kernels.side_attention import op as side_attention
from ..kernels.tables import SiteTargets
from .counting import Work
from .gpu_case import EPS, AdapterStep, Build, Case, Load
from .gpu_operands import Operands

_SIDE_KEYS = 10


def row_cases(shapes: Shapes, load: Load) -> Iterator[Build]:
    """Of every such operation, in a decode step and in a prompt."""
    for step in load.steps:
        for build in _BUILDS:
            yield partial(build, _Sizes(shapes, load, step))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What a case's operands are made for."""

    shapes: Shapes
    load: Load
    step: AdapterStep

    @property
    def rows(self) -> tuple[int, int]:
        """Of the step, and their width."""
        return self.step.rows, self.shapes.hidden

    @property
    def heads(self) -> tuple[int, int, int]:
        """The step's rows, by query head."""
        return self.step.rows, self.shapes.heads, self.shapes.head_dim

    def case(
        self,
        operands: Operands,
        operation: str,
        name: str,
        make: Callable[[], tuple[int, ...]],
        arguments: Sequence[Tensor],
        *more: object,
        max_inner: int = 0,
    ) -> Case:
        """Of an operation (changed, others..., table, row, segments, more...).

        Its work are the adapters' tensors, what is changed, read and written, and the others, read.
        """
        step = self.step
        table = operands.table([[make() for _ in range(step.adapters)]])
        segments = operands.segments(step.adapters, step.each, max_inner)

        def run(backend: Backend) -> None:
            correct: Any = getattr(backend.deltas, operation)
            correct(*arguments, table, 0, segments, *more)

        moved = arguments[0].nbytes + sum(each.nbytes for each in arguments)
        work = Work(operands.taken_bytes + moved)
        title = f"{name}, {step.name}"
        return Case(operation, title, run, work, (arguments[0],))


def _scaled_input(sizes: _Sizes, operands: Operands) -> Case:
    def cell() -> input_transform.Cell:
        return input_transform.Cell(0, scale=operands.numbers(sizes.shapes.hidden))

    return _of_inputs(sizes, operands, "scale", cell)


def _rotated_input(sizes: _Sizes, operands: Operands) -> Case:
    block = sizes.load.block

    def cell() -> input_transform.Cell:
        blocks = sizes.shapes.hidden // block
        return input_transform.Cell(1, blocks, block, operands.numbers(blocks, block, block))

    return _of_inputs(sizes, operands, f"rotations in blocks of {block}", cell)


def _of_inputs(
    sizes: _Sizes, operands: Operands, name: str, make: Callable[[], input_transform.Cell]
) -> Case:
    """The inputs of a site of one target; its work are the adapters' tensors, and rows twice."""
    step, x = sizes.step, operands.rows(*sizes.rows)
    table = operands.table([[make() for _ in range(step.adapters)]])
    segments = operands.segments(step.adapters, step.each, 0)
    targets = SiteTargets(0, (0,), (sizes.shapes.hidden,))

    def run(backend: Backend) -> Tensor:
        return backend.deltas.transform_inputs(x, table, targets, segments)

    work = Work(operands.taken_bytes + 2 * x.nbytes)
    return Case("transform_inputs", f"{name}, {step.name}", run, work)


def _replaced_rows(sizes: _Sizes, operands: Operands) -> Case:
    """Of R no more is read than rows are written, and nothing of what is replaced."""
    tokens, hidden = sizes.load.tokens, sizes.shapes.hidden
    apart = sizes.shapes.vocab // tokens
    x = operands.zeros(*sizes.rows)
    ids = operands.below(tokens, len(x)) * apart

    def cell() -> embedding.RowsCell:
        stored = operands.indices(torch.arange(tokens) * apart)
        return embedding.RowsCell(tokens, operands.numbers(tokens, hidden), stored)

    case = sizes.case(operands, "replace_rows", f"{tokens} tokens", cell, [x, ids])
    return replace(case, work=Work(2 * x.nbytes + ids.nbytes))


def _corrected_embedding(sizes: _Sizes, operands: Operands) -> Case:
    """Of A one row is read for each of x."""
    rank, shapes = sizes.load.ranks[0], sizes.shapes
    x = operands.zeros(*sizes.rows)
    ids = operands.below(shapes.vocab, len(x))

    def cell() -> embedding.AffineCell:
        a, b = operands.numbers(shapes.vocab, rank), operands.numbers(rank, shapes.hidden)
        return embedding.AffineCell(rank, shapes.vocab, a, b)

    case = sizes.case(operands, "correct_embedding", f"rank {rank}", cell, [x, ids])
    numbers = rank * (sizes.step.adapters * shapes.hidden + len(x))
    return replace(case, work=Work(numbers * x.itemsize + 2 * x.nbytes + ids.nbytes))


def _overridden_norm(sizes: _Sizes, operands: Operands) -> Case:
    """What is replaced is not read."""

    def cell() -> norm_override.Cell:
        return norm_override.Cell(operands.numbers(sizes.shapes.hidden))

    y, x = operands.zeros(*sizes.rows), operands.rows(*sizes.rows)
    case = sizes.case(operands, "override_norm", "RMS norm", cell, [y, x], EPS, False)
    return replace(case, work=Work(case.work.num_bytes - y.nbytes))


def _bottleneck(sizes: _Sizes, operands: Operands) -> Case:
    """r is not read: the bottleneck's input is h."""
    width, hidden = sizes.load.width, sizes.shapes.hidden
    out, h = operands.zeros(*sizes.rows), operands.rows(*sizes.rows)
    kind = (bottleneck.Activation.GELU, bottleneck.Source.OUTPUT)

    def cell() -> bottleneck.Cell:
        down, up = (operands.numbers(width, hidden) for _ in range(2))
        return bottleneck.Cell(width, *kind, down, up)

    name = f"width {width}"
    case = sizes.case(operands, "add_bottleneck", name, cell, [out, h, h], max_inner=width)
    return replace(case, work=Work(case.work.num_bytes - h.nbytes))


def _side_attention(sizes: _Sizes, operands: Operands) -> Case:
    shapes = sizes.shapes

    def cell() -> side_attention.Cell:
        keys, values = (
            operands.numbers(shapes.kv_heads, _SIDE_KEYS, shapes.head_dim) for _ in range(2)
        )
        return side_attention.Cell(_SIDE_KEYS, keys, values)

    return sizes.case(
        operands,
        "add_side_attention",
        f"{_SIDE_KEYS} keys",
        cell,
        [operands.zeros(*sizes.heads), operands.rows(*sizes.heads)],
        shapes.kv_heads,
        shapes.head_dim**-0.5,
    )


_BUILDS = (
    *(_scaled_input, _rotated_input, _replaced_rows, _corrected_embedding),
    *(_overridden_norm, _bottleneck, _side_attention),
)
