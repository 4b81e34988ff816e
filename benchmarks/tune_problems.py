"""What is timed to choose the configurations of kernels: operands at the sizes of real bases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from ..kernels.affine import gpu as affine_gpu
from ..kernels.bottleneck import gpu as bottleneck_gpu
from ..kernels.bottleneck.op import Activation, Source
from ..kernels.bottleneck.op import Cell as BottleneckCell
from ..kernels.circulant import gpu as circulant_gpu
from ..kernels.dense import gpu as dense_gpu
from ..kernels.gpu.corrections import Correction, Site
from ..kernels.gpu.launch import run_all
from ..kernels.gpu.rows import Place, flat
from ..kernels.gpu.shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B, Shapes
from ..kernels.gpu.tuning import ChooseConfig, Key
from ..kernels.kronecker import gpu as kronecker_gpu
from ..kernels.output_rows import gpu as output_rows_gpu
from ..kernels.paged_attention import gpu as attention_gpu
from ..kernels.sparse import gpu as sparse_gpu
from .gpu_operands import (
    MakeCell,
    Operands,
    affine,
    circulant,
    dense,
    kronecker,
    kronecker_inner,
    output_rows,
    paged_operands,
    site_operands,
    sparse,
)

_NO_WINDOW = 1 << 30
"""Keys: more than there are."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The sizes that are timed.

    Attributes:
        rows: Of the longest segment or sequence, ascending.
        inner: Ranks and widths, ascending.
        contexts: Keys, ascending.
        step: Rows of a decode step, and of any other with no longer segments.
        bases: Whose sites, layers and heads.
    """

    rows: Sequence[int] = (1, 16, 64, 2048)
    inner: Sequence[int] = (8, 16, 32, 64, 128, 256)
    contexts: Sequence[int] = (256, 1024, 4096, 16384)
    step: int = 64
    bases: Sequence[Shapes] = (LLAMA_1B, LLAMA_8B, LLAMA_70B)


class Point(NamedTuple):
    """Sizes that are timed: as they are, and the powers of two that they stand for."""

    size: int
    stands_for: tuple[int, ...]


Launch = Callable[[int], object]
"""Launches an operation in the configuration of an index."""

Build = Callable[[Operands], Launch]
"""Makes operands; what the build before took may be overwritten."""


@dataclass(slots=True)
class Problem:
    """What is timed to choose for some keys.

    Attributes:
        key: Of the sizes that are timed.
        keys: That it is measured for.
        builds: Whose times are added up.
    """

    key: Key
    keys: tuple[Key, ...]
    builds: list[Build]


@dataclass(frozen=True, slots=True)
class Tunable:
    """An operation with a choice.

    Attributes:
        name: By which its choices are kept.
        configs: What there is to choose from.
        rule: What is taken where nothing was measured.
        problems: What to time.
    """

    name: str
    configs: Sequence[object]
    rule: ChooseConfig
    problems: Callable[[Grid], Sequence[Problem]]


def points(sizes: Sequence[int]) -> list[Point]:
    """Each for the powers of two above the one before it."""
    before = [0, *sizes]
    return [
        Point(size, tuple(1 << i for i in range(size.bit_length()) if 1 << i > low))
        for low, size in zip(before, sizes, strict=False)
    ]


def tunables() -> Sequence[Tunable]:
    """Every operation with several configurations."""
    return (
        _of_sites(affine_gpu.CORRECT_AFFINE, affine_gpu.CONFIGS, affine, _ranks),
        _of_sites(dense_gpu.ADD_DENSE, dense_gpu.CONFIGS, lambda _: dense, _nothing, most=8),
        _of_sites(sparse_gpu.ADD_SPARSE, sparse_gpu.CONFIGS, lambda _: sparse(8), _nothing),
        _of_sites(
            kronecker_gpu.ADD_KRONECKER, kronecker_gpu.CONFIGS, lambda _: kronecker(0), _products
        ),
        _of_sites(
            circulant_gpu.ADD_CIRCULANT, circulant_gpu.CONFIGS, lambda _: circulant(64), _nothing
        ),
        _of_sites(
            output_rows_gpu.REPLACE_OUTPUTS,
            output_rows_gpu.CONFIGS,
            lambda _: output_rows(64),
            _nothing,
        ),
        Tunable(
            bottleneck_gpu.NAME,
            bottleneck_gpu.CONFIGS,
            bottleneck_gpu.choose_config,
            _bottleneck_problems,
        ),
        Tunable(
            "paged_attention",
            attention_gpu.CONFIGS,
            attention_gpu.choose_config,
            _attention_problems,
        ),
    )


Inner = Callable[[Grid, int, Sequence[int]], list[Point]]
"""inner(grid, in_size, out_sizes): inner widths to time a correction of a site with."""


def _ranks(grid: Grid, _: int, __: Sequence[int]) -> list[Point]:
    return points(grid.inner)


def _nothing(_: Grid, __: int, ___: Sequence[int]) -> list[Point]:
    """One product keeps nothing between two."""
    return [Point(0, (0,))]


def _products(_: Grid, in_size: int, out_sizes: Sequence[int]) -> list[Point]:
    inner = max(kronecker_inner(in_size, out_size) for out_size in out_sizes)
    return [Point(inner, (inner,))]


def _of_sites(
    correction: Correction,
    configs: Sequence[object],
    make: Callable[[int], MakeCell],
    inner: Inner,
    most: int = 64,
) -> Tunable:
    """A correction of linear modules; ``most`` bounds the adapters of a decode step."""
    problems = partial(_site_problems, correction, make, inner, most)
    return Tunable(correction.name, configs, correction.choose_config, problems)


def _site_problems(
    correction: Correction, make: Callable[[int], MakeCell], inner: Inner, most: int, grid: Grid
) -> Sequence[Problem]:
    found: dict[Key, Problem] = {}
    spectral = correction is sparse_gpu.ADD_SPARSE
    rows_points = points(sorted({*grid.rows, 2} if spectral else grid.rows))
    for shapes, rows in product(grid.bases, rows_points):
        step = _Step(min(_adapters(grid, rows.size), most), rows.size)
        for _, in_size, out_sizes in shapes.sites:
            for width in inner(grid, in_size, out_sizes):
                site = (in_size, out_sizes)
                build = partial(_site_launch, correction, make(width.size), site, step, width.size)
                _add(found, rows, width, in_size, build)
    return list(found.values())


def _site_launch(
    correction: Correction,
    make: MakeCell,
    site_sizes: tuple[int, Sequence[int]],
    step: "_Step",
    inner: int,
    operands: Operands,
) -> Launch:
    segments = operands.segments(step.adapters, step.each, inner)
    # A spectral correction of one row is a sparse one of two rows of float32.
    halves = correction is sparse_gpu.ADD_SPARSE and step.each == 2
    dtype = torch.float32 if halves else None
    made = site_operands(operands, make, *site_sizes, segments, dtype)
    site = Site(
        y=made.y,
        x=made.x,
        cells=made.table.cells,
        numbers=made.table.numbers,
        indices=made.table.indices,
        first=made.targets.first,
        out_starts=made.targets.out_starts,
        out_sizes=made.targets.out_sizes,
        start=segments.start,
        end=segments.end,
        slot=segments.adapter_slot,
        weight=segments.weight,
        max_rows=segments.max_rows,
        max_inner=segments.max_inner,
    )
    return lambda config: run_all(correction.launches(site, config))


def _bottleneck_problems(grid: Grid) -> Sequence[Problem]:
    found: dict[Key, Problem] = {}
    for shapes, rows, width in product(grid.bases, points(grid.rows), points(grid.inner)):
        step = _Step(_adapters(grid, rows.size), rows.size)
        build = partial(_bottleneck_launch, shapes.hidden, step, width.size)
        _add(found, rows, width, shapes.hidden, build)
    return list(found.values())


def _bottleneck_launch(hidden: int, step: "_Step", width: int, operands: Operands) -> Launch:
    rows = step.adapters * step.each
    out, h = operands.zeros(rows, hidden), operands.rows(rows, hidden)
    kind = (Activation.GELU, Source.OUTPUT)
    cells = [
        BottleneckCell(
            width, *kind, operands.numbers(width, hidden), operands.numbers(width, hidden)
        )
        for _ in range(step.adapters)
    ]
    segments = operands.segments(step.adapters, step.each, width)
    place = Place(*flat(operands.table([cells]), 0, segments))
    return lambda config: run_all(bottleneck_gpu.launches(out, h, h, config, place))


def _attention_problems(grid: Grid) -> Sequence[Problem]:
    found: dict[Key, Problem] = {}
    for shapes, rows, context in product(grid.bases, points(grid.rows), points(grid.contexts)):
        # A row sees its own key at least.
        keys = max(context.size, rows.size)
        step = _Step(_adapters(grid, rows.size), rows.size)
        build = partial(_attention_launch, shapes, step, keys)
        _add(found, rows, context, shapes.head_dim, build)
    return list(found.values())


def _attention_launch(shapes: Shapes, step: "_Step", context: int, operands: Operands) -> Launch:
    paged = paged_operands(operands, shapes, step.adapters, step.each, context)
    batch, out = paged.batch, torch.empty_like(paged.query)
    attention = attention_gpu.Attention(
        query=paged.query,
        key_cache=paged.key_cache,
        value_cache=paged.value_cache,
        cu_seqlens_q=batch.cu_seqlens_q,
        context_starts=batch.context_starts,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
        max_seqlen_q=step.each,
        max_context_len=context,
        scale=paged.scale,
        window=_NO_WINDOW,
    )
    return lambda config: run_all(attention_gpu.launches(attention, out, config))


def _add(found: dict[Key, Problem], rows: Point, inner: Point, size: int, build: Build) -> None:
    """Time it with whatever else has its key."""
    key = Key.of(rows.size, inner.size, size)
    keys = [Key.of(*sizes, size) for sizes in product(rows.stands_for, inner.stands_for)]
    problem = found.setdefault(key, Problem(key, tuple(dict.fromkeys(keys)), []))
    problem.builds.append(build)


class _Step(NamedTuple):
    """Different adapters, or sequences, and rows of each."""

    adapters: int
    each: int


def _adapters(grid: Grid, rows: int) -> int:
    """Of a step whose segments have so many rows."""
    return max(grid.step // rows, 1)
