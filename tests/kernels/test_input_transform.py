"""transform_inputs against the block-diagonal and permutation matrices it stands for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from deltamux.kernels.backend import Backend
from deltamux.kernels.input_transform.op import Cell
from deltamux.kernels.tables import PrimitiveTable, SiteTargets

from .compare import assert_close, same_bits
from .pools import FIRST, NAN, Pool, num_threads, poison_outside, segments_of, strided_rows

Groups = Sequence[tuple[int, int, int, float]]

ONE_TARGET = SiteTargets(FIRST, (0,), (1,))
"""How wide it is does not matter: inputs are not outputs."""


@dataclass(frozen=True)
class Shape:
    """What one adapter does: stages of rotations in blocks, and a scale."""

    stages: int = 0
    block: int = 0
    shared: bool = False
    permuted: bool = False
    scaled: bool = False


SHAPES = {
    "scale": Shape(scaled=True),
    "one-stage": Shape(1, 12),
    "shared": Shape(1, 20, shared=True),
    "whole": Shape(1, 60),
    "pairs": Shape(1, 2, scaled=True),
    "block-of-1": Shape(1, 1),
    "permuted": Shape(1, 4, permuted=True),
    "butterfly": Shape(3, 15, permuted=True, scaled=True),
    "shared-stages": Shape(2, 30, shared=True, permuted=True),
    "two-stages": Shape(2, 6),
}


@dataclass(frozen=True)
class Site:
    """Adapters of one target: x <- x ``matrices[slot]``, with ``terms`` of absolute terms."""

    size: int
    table: PrimitiveTable
    matrices: dict[int, Tensor]
    terms: dict[int, Tensor]


def put(pool: Pool, rng: torch.Generator, size: int, shape: Shape) -> tuple[Cell, Tensor, Tensor]:
    """The cell, and its matrix as a product of explicit ones."""
    matrix = terms = torch.eye(size, dtype=torch.float64)
    rotations = permutations = scale = -1
    blocks = 0
    if shape.scaled:
        s = torch.randn(size, generator=rng).to(pool.dtype)
        scale, matrix, terms = pool.put(s), torch.diag(s.double()), torch.diag(s.double().abs())
    if shape.stages:
        blocks = 1 if shape.shared else size // shape.block
        r = torch.randn(shape.stages, blocks, shape.block, shape.block, generator=rng)
        r = (r * shape.block**-0.5).to(pool.dtype)
        rotations = pool.put(r)
        p = torch.arange(size).expand(shape.stages, size)
        if shape.permuted:
            p = torch.stack([torch.randperm(size, generator=rng) for _ in range(shape.stages)])
            permutations = pool.put(p.int())
        for stage in range(shape.stages):
            count = size // shape.block
            rotation = torch.block_diag(*r[stage].double().expand(count, -1, -1))
            order = torch.eye(size, dtype=torch.float64)[:, p[stage]]  # x @ order is x[:, p]
            matrix = matrix @ order @ rotation @ order.T
            terms = terms @ order @ rotation.abs() @ order.T
    cell = Cell(shape.stages, blocks, shape.block, rotations, permutations, scale)
    return cell, matrix, terms


def make_site(dtype: torch.dtype, size: int, shapes: Sequence[Shape | None]) -> Site:
    """One slot a shape; None leaves it empty."""
    rng, pool = torch.Generator().manual_seed(0), Pool(dtype)
    made = {
        slot: put(pool, rng, size, shape) for slot, shape in enumerate(shapes) if shape is not None
    }
    table = pool.table(1, len(shapes), {(0, slot): cell for slot, (cell, _, _) in made.items()})
    return Site(
        size,
        table,
        {slot: matrix for slot, (_, matrix, _) in made.items()},
        {slot: terms for slot, (_, _, terms) in made.items()},
    )


def check(backend: Backend, site: Site, rows: int, groups: Groups) -> None:
    x = strided_rows(rows, site.size, site.table.numbers.dtype, torch.Generator().manual_seed(1))
    poison_outside(x, groups)
    before, buffer = x.clone(), x._base
    assert buffer is not None
    whole = buffer.clone()
    with num_threads(2):
        inputs = backend.deltas.transform_inputs(x, site.table, ONE_TARGET, segments_of(groups))
    assert inputs.shape == (1, *x.shape)
    (found,) = inputs
    changed = torch.zeros(rows, dtype=torch.bool)
    for start, end, slot, _ in groups:
        if slot in site.matrices and start < end:
            changed[start:end] = True
            old = before[start:end].double()
            exact, magnitude = old @ site.matrices[slot], old.abs() @ site.terms[slot]
            assert_close(found[start:end], exact.float(), magnitude.float())
    assert same_bits(found[~changed], before[~changed])
    assert same_bits(buffer, whole), "x was written"


def transformed(
    backend: Backend,
    x: Tensor,
    site: Site,
    group: tuple[int, int, int, float],
    targets: SiteTargets = ONE_TARGET,
) -> Tensor:
    """The input of a site's one target."""
    (found,) = backend.deltas.transform_inputs(x, site.table, targets, segments_of([group]))
    return found


@pytest.fixture(params=["compiled", "reference", "interpreted"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("backend", "rows"),
    [
        *product(["compiled", "reference"], [1, 5, 16, 39]),
        *product(["interpreted"], [1, 39]),  # one by one, and in tiles
    ],
    indirect=["backend"],
)
def test_it_is_its_explicit_matrix(
    backend: Backend, dtype: torch.dtype, shape: str, rows: int
) -> None:
    check(backend, make_site(dtype, 60, [SHAPES[shape]]), rows, [(0, rows, 0, 1.0)])


@pytest.mark.parametrize(("size", "block"), [(7, 7), (35, 5), (192, 32), (66, 33), (1, 1)])
def test_odd_sizes(backend: Backend, dtype: torch.dtype, size: int, block: int) -> None:
    site = make_site(dtype, size, [Shape(2, block, permuted=True, scaled=True)])
    check(backend, site, 19, [(1, 18, 0, 1.0)])


def test_many_adapters_and_none(backend: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [*SHAPES.values(), None])
    groups = [(3 * slot + 1, 3 * slot + 3, slot, 0.5) for slot in range(len(SHAPES) + 1)]
    check(backend, site, 3 * len(SHAPES) + 5, [*groups, (3 * len(SHAPES) + 4,) * 2 + (0, 1.0)])
    check(backend, site, 4, [])


def test_a_row_has_the_same_bits_alone_and_in_any_company(
    compiled: Backend, dtype: torch.dtype
) -> None:
    site = make_site(dtype, 60, [*SHAPES.values()])
    x = torch.randn(37, 60, generator=torch.Generator().manual_seed(2)).to(dtype)
    for slot in range(len(SHAPES)):
        with num_threads(2):
            together = transformed(compiled, x, site, (0, 37, slot, 1.0))
        for row in range(37):
            alone = transformed(compiled, x[row : row + 1], site, (0, 1, slot, 1.0))
            assert same_bits(alone, together[row : row + 1])


def test_a_nan_stays_in_its_row(compiled: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [SHAPES["butterfly"]])
    x = torch.ones(9, 60, dtype=dtype)
    x[4, 7] = NAN
    found = transformed(compiled, x, site, (0, 9, 0, 1.0))
    assert found.isnan().any(1).tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (0, 1 << 61, "outside the pool"),
        (0, 4, "outside the pool"),
        (1, 1 << 61, "do not make up|outside the pool"),
        (1, 2, "do not make up"),
        (2, 7, "do not make up"),
        (2, 0, "do not make up"),
        (3, -1, "outside the pool"),
        (3, 1 << 40, "outside the pool"),
        (4, 1 << 40, "outside the pool"),
        (5, (1 << 63) - 1, "outside the pool"),
    ],
)
def test_cells_that_reach_outside_are_refused(
    compiled: Backend, field: int, value: int, words: str
) -> None:
    site = make_site(torch.float32, 60, [SHAPES["butterfly"]])
    site.table.cells[FIRST, 0, field] = value
    with pytest.raises(IndexError, match=words):
        transformed(compiled, torch.ones(3, 60), site, (0, 3, 0, 1.0))


@pytest.mark.parametrize("index", [-1, 60])
def test_permutations_that_reach_outside_are_refused(compiled: Backend, index: int) -> None:
    site = make_site(torch.float32, 60, [SHAPES["butterfly"]])
    site.table.indices[site.table.cells[FIRST, 0, 4] + 100] = index
    with pytest.raises(IndexError, match="outside the input"):
        transformed(compiled, torch.ones(3, 60), site, (0, 3, 0, 1.0))


def test_rows_and_slots_that_are_not_there_are_refused(compiled: Backend) -> None:
    site = make_site(torch.float32, 60, [SHAPES["scale"]])
    for row, group in (
        (FIRST + 1, (0, 3, 0, 1.0)),
        (-1, (0, 3, 0, 1.0)),
        (FIRST, (0, 4, 0, 1.0)),
        (FIRST, (0, 3, 1, 1.0)),
    ):
        with pytest.raises(IndexError):
            transformed(compiled, torch.ones(3, 60), site, group, SiteTargets(row, (0,), (1,)))


def test_wrong_tensors_are_refused_by_what_is_wrong(compiled: Backend) -> None:
    site = make_site(torch.float32, 60, [SHAPES["scale"]])
    segments = segments_of([(0, 3, 0, 1.0)])
    transform = compiled.deltas.transform_inputs
    with pytest.raises(ValueError, match="bfloat16"):
        transform(torch.ones(3, 60).bfloat16(), site.table, ONE_TARGET, segments)
    with pytest.raises(ValueError, match="strides"):
        transform(torch.ones(60, 3).T, site.table, ONE_TARGET, segments)
    wrong = replace(segments, weight=segments.weight.double())
    with pytest.raises(ValueError, match="segments' weight"):
        transform(torch.ones(3, 60), site.table, ONE_TARGET, wrong)


def test_every_target_has_an_input_of_its_own(backend: Backend, dtype: torch.dtype) -> None:
    """Of three targets, whose cells are of different slots; rows of none are those of x."""
    rng, pool = torch.Generator().manual_seed(4), Pool(dtype)
    placed = {(0, 0): "scale", (0, 1): "one-stage", (2, 1): "butterfly", (2, 2): "permuted"}
    made = {place: put(pool, rng, 60, SHAPES[name]) for place, name in placed.items()}
    table = pool.table(3, 3, {place: cell for place, (cell, _, _) in made.items()})
    groups = [(1, 3, 0, 1.0), (4, 9, 1, 1.0), (9, 11, 2, 1.0)]
    x = strided_rows(40, 60, dtype, torch.Generator().manual_seed(5))
    targets = SiteTargets(FIRST, (0, 9, 16), (9, 7, 4))
    with num_threads(2):
        inputs = backend.deltas.transform_inputs(x, table, targets, segments_of(groups))
    for target, found in enumerate(inputs):
        expected = x.clone()
        for start, end, slot, _ in groups:
            if (target, slot) in made:
                _, matrix, terms = made[target, slot]
                old = x[start:end].double()
                exact, magnitude = old @ matrix, old.abs() @ terms
                assert_close(found[start:end], exact.float(), magnitude.float())
                expected[start:end] = found[start:end]
        assert same_bits(found, expected)
