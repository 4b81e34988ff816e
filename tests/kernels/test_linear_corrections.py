"""Corrections of linear modules against the explicit matrix each of them stands for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from deltamux.kernels.backend import Backend, DeltaOps
from deltamux.kernels.circulant.gpu import ADD_CIRCULANT
from deltamux.kernels.circulant.op import Cell as CirculantCell
from deltamux.kernels.dense.gpu import ADD_DENSE
from deltamux.kernels.dense.op import Cell as DenseCell
from deltamux.kernels.gpu.tuning import Key
from deltamux.kernels.kronecker.gpu import ADD_KRONECKER
from deltamux.kernels.kronecker.op import Cell as KroneckerCell
from deltamux.kernels.output_rows.gpu import REPLACE_OUTPUTS
from deltamux.kernels.output_rows.op import Cell as OutputRowsCell
from deltamux.kernels.sparse.gpu import ADD_SPARSE
from deltamux.kernels.sparse.op import Cell as SparseCell
from deltamux.kernels.spectral import gpu as spectral_gpu
from deltamux.kernels.tables import CorrectLinear, PrimitiveTable, SiteTargets

from .compare import assert_close, same_bits
from .on_gpu import placed
from .pools import FIRST, Pool, num_threads, poison_outside, segments_of, strided_rows

Groups = Sequence[tuple[int, int, int, float]]


@dataclass(frozen=True)
class Delta:
    """One adapter's correction: its cell, the matrix it stands for, and that of absolute terms.

    ``columns`` are those whose output is x . weight instead of being added to.
    """

    cell: tuple[int, ...]
    weight: Tensor
    terms: Tensor
    columns: Tensor | None = None

    def expected(self, y: Tensor, x: Tensor, w: float) -> tuple[Tensor, Tensor]:
        """The exact result for rows y and x, and a bound of its terms."""
        delta, terms = x.double() @ self.weight.T, x.double().abs() @ self.terms.T
        if self.columns is None:
            return y.double() + w * delta, y.double().abs() + abs(w) * terms
        exact, magnitude = y.double().clone(), y.double().abs()
        exact[:, self.columns], magnitude[:, self.columns] = delta, terms
        return exact, magnitude


Make = Callable[[Pool, torch.Generator, int, int], Delta]


def randn(pool: Pool, rng: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=rng) * scale).to(pool.dtype)


def dense(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
    weight = randn(pool, rng, out_size, in_size)
    return Delta(DenseCell(pool.put(weight)), weight.double(), weight.double().abs())


def sparse_entries(
    pool: Pool, rng: torch.Generator, in_size: int, out_size: int, density: float
) -> tuple[SparseCell, Tensor]:
    mask = torch.rand(out_size, in_size, generator=rng) < density
    mask[0] = density > 0  # a full row, and one without entries
    mask[out_size // 2] = False
    weight = randn(pool, rng, out_size, in_size) * mask
    starts = torch.cat((torch.zeros(1), mask.sum(1).cumsum(0))).int()
    columns, values = mask.nonzero()[:, 1].int(), weight[mask]
    cell = SparseCell(values.numel(), pool.put(starts), pool.put(columns), pool.put(values))
    return cell, weight.double()


def sparse(density: float) -> Make:
    def make(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
        cell, weight = sparse_entries(pool, rng, in_size, out_size, density)
        return Delta(cell, weight, weight.abs())

    return make


def spectral(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
    cell, spectrum = sparse_entries(pool, rng, in_size, out_size, 0.1)
    weight = torch.fft.ifft2(spectrum).real
    terms = spectrum.abs().sum() / spectrum.numel()
    return Delta(cell, weight, terms.expand(weight.shape))


def largest_divisor(size: int, limit: float) -> int:
    return max(d for d in range(1, size + 1) if size % d == 0 and d <= limit)


def kronecker(rank: int, swapped: bool = False) -> Make:
    """L small and R large, or, swapped, L large and R small."""

    def make(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
        small = [largest_divisor(size, math.sqrt(size)) for size in (out_size, in_size)]
        large = [out_size // small[0], in_size // small[1]]
        (rows, columns), (k, n) = (large, small) if swapped else (small, large)
        left = randn(pool, rng, rows, columns)
        if not rank:
            right = randn(pool, rng, k, n)
            cell = KroneckerCell(rows, columns, 0, pool.put(left), pool.put(right))
            weight = torch.kron(left.double(), right.double())
            return Delta(cell, weight, weight.abs())
        down, up = randn(pool, rng, rank, n), randn(pool, rng, k, rank, scale=rank**-0.5)
        cell = KroneckerCell(rows, columns, rank, pool.put(left), pool.put(down), pool.put(up))
        factors = (left.double(), up.double(), down.double())
        weight = torch.kron(factors[0], factors[1] @ factors[2])
        terms = torch.kron(factors[0].abs(), factors[1].abs() @ factors[2].abs())
        return Delta(cell, weight, terms)

    return make


def circulant(block: int) -> Make:
    def make(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
        b = math.gcd(block, in_size, out_size)
        kernel = randn(pool, rng, out_size // b, in_size // b, b)
        weight = torch.zeros(out_size, in_size, dtype=torch.float64)
        for p in range(b):
            for q in range(b):
                weight[p::b, q::b] = kernel[:, :, (q - p) % b].double()
        return Delta(CirculantCell(b, pool.put(kernel)), weight, weight.abs())

    return make


def output_rows(count: int) -> Make:
    def make(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
        columns = torch.randperm(out_size, generator=rng)[:count].sort().values
        weight = randn(pool, rng, len(columns), in_size)
        cell = OutputRowsCell(len(columns), pool.put(columns.int()), pool.put(weight))
        return Delta(cell, weight.double(), weight.double().abs(), columns)

    return make


OPERATIONS: dict[str, tuple[str, Make]] = {
    "dense": ("add_dense", dense),
    "sparse": ("add_sparse", sparse(0.1)),
    "sparse-full": ("add_sparse", sparse(0.9)),
    "sparse-none": ("add_sparse", sparse(0.0)),
    "spectral": ("add_spectral", spectral),
    "kronecker": ("add_kronecker", kronecker(0)),
    "kronecker-swapped": ("add_kronecker", kronecker(0, swapped=True)),
    "kronecker-rank-1": ("add_kronecker", kronecker(1)),
    "kronecker-rank-19": ("add_kronecker", kronecker(19)),
    "kronecker-rank-5-swapped": ("add_kronecker", kronecker(5, swapped=True)),
    "circulant": ("add_circulant", circulant(1 << 30)),
    "circulant-12": ("add_circulant", circulant(12)),
    "circulant-1": ("add_circulant", circulant(1)),
    "output-rows": ("replace_outputs", output_rows(70)),
    "output-row": ("replace_outputs", output_rows(1)),
    "output-rows-none": ("replace_outputs", output_rows(0)),
}


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> tuple[str, Make]:
    return OPERATIONS[request.param]


@pytest.fixture(params=["compiled", "reference"])
def deltas(request: pytest.FixtureRequest) -> DeltaOps:
    backend: Backend = request.getfixturevalue(request.param)
    return backend.deltas


MAX_INNER = 300
"""Of the Kronecker products here: the largest m k."""


@dataclass(frozen=True)
class Site:
    """One GEMM with adapters; ``deltas[target, slot]`` is missing where the cell is empty."""

    in_size: int
    targets: SiteTargets
    table: PrimitiveTable
    deltas: dict[tuple[int, int], Delta]

    @property
    def out_size(self) -> int:
        return self.targets.out_starts[-1] + self.targets.out_sizes[-1]


def make_site(
    make: Make, dtype: torch.dtype, in_size: int, widths: Sequence[int], slots: int = 1
) -> Site:
    """Every third cell but the first is empty, and a column of no target lies between targets."""
    rng, pool = torch.Generator().manual_seed(0), Pool(dtype)
    places = [(t, s) for t in range(len(widths)) for s in range(slots)]
    found = {
        (t, s): make(pool, rng, in_size, widths[t]) for t, s in places if not t + s or (t + s) % 3
    }
    cells = {place: delta.cell for place, delta in found.items()}
    starts = tuple(sum(widths[:t]) + t for t in range(len(widths)))
    targets = SiteTargets(FIRST, starts, tuple(widths))
    return Site(in_size, targets, pool.table(len(widths), slots, cells), found)


def expected(site: Site, y: Tensor, x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    exact, magnitude = y.double().clone(), y.double().abs()
    for start, end, slot, w in groups:
        columns = zip(site.targets.out_starts, site.targets.out_sizes, strict=True)
        for t, (first, width) in enumerate(columns):
            if delta := site.deltas.get((t, slot)):
                at = (slice(start, end), slice(first, first + width))
                exact[at], magnitude[at] = delta.expected(y[at], x[start:end], w)
    return exact.float(), magnitude.float()


def check(
    correct: CorrectLinear,
    site: Site,
    dtype: torch.dtype,
    rows: int,
    groups: Groups,
    padding: Tensor | None = None,
) -> None:
    """``padding`` are rows that ``Segments.rows`` has behind those of the groups."""
    rng = torch.Generator().manual_seed(1)
    x = strided_rows(rows, site.in_size, dtype, rng)
    y = strided_rows(rows, site.out_size, dtype, rng)
    inside = poison_outside(x, groups)
    before, buffer = y.clone(), y._base
    assert buffer is not None
    margins = buffer.clone()
    segments = replace(segments_of(groups), max_inner=MAX_INNER)
    if padding is not None:
        segments = replace(segments, rows=torch.cat((segments.rows, padding)))
    correct(y, x, site.table, site.targets, segments)
    exact, magnitude = expected(site, before, x, groups)
    if inside.any():
        assert_close(y[inside], exact[inside], magnitude[inside])
    corrected = torch.zeros(y.shape, dtype=torch.bool)
    for start, end, slot, _ in groups:
        for t, (first, width) in enumerate(
            zip(site.targets.out_starts, site.targets.out_sizes, strict=True)
        ):
            corrected[start:end, first : first + width] |= (t, slot) in site.deltas
    assert same_bits(y[~corrected], before[~corrected])
    margins[:, 3 : 3 + site.out_size] = y
    assert same_bits(buffer, margins), "columns beside the view were written"


MIXED: Groups = ((1, 2, 0, 1.0), (2, 2, 2, 1.0), (3, 6, 1, -0.625), (8, 27, 0, 1.5), (27, 28, 2, 1))


@pytest.mark.parametrize(
    ("in_size", "widths"),
    [(60, (60, 20)), (7, (1,)), (1, (5,)), (33, (130, 67, 3)), (96, (480,)), (200, (100, 300))],
)
def test_it_is_its_explicit_matrix(
    deltas: DeltaOps,
    operation: tuple[str, Make],
    dtype: torch.dtype,
    in_size: int,
    widths: tuple[int, ...],
) -> None:
    name, make = operation
    site = make_site(make, dtype, in_size, widths, slots=3)
    check(getattr(deltas, name), site, dtype, 29, MIXED)


def test_on_a_gpu_it_is_its_explicit_matrix(
    interpreted: Backend, operation: tuple[str, Make], dtype: torch.dtype
) -> None:
    name, make = operation
    site = make_site(make, dtype, 60, (30, 20), slots=3)
    check(getattr(interpreted.deltas, name), site, dtype, 29, MIXED)


@pytest.mark.parametrize(("in_size", "width"), [(7, 1), (1, 5)])
def test_on_a_gpu_a_width_of_one_is_its_explicit_matrix(
    interpreted: Backend, operation: tuple[str, Make], in_size: int, width: int
) -> None:
    name, make = operation
    site = make_site(make, torch.float32, in_size, (width,))
    check(getattr(interpreted.deltas, name), site, torch.float32, 4, [(1, 4, 0, -0.625)])


@pytest.mark.parametrize("groups", [[(0, 1, 0, 1.0)], [(s, s + 1, s, 0.5) for s in range(4)]])
def test_on_a_gpu_a_decode_step_is_its_explicit_matrix(
    interpreted: Backend, operation: tuple[str, Make], groups: Groups
) -> None:
    name, make = operation
    site = make_site(make, torch.float16, 60, (24, 12), slots=4)
    check(getattr(interpreted.deltas, name), site, torch.float16, len(groups), groups)


def test_on_a_gpu_a_long_segment_is_its_explicit_matrix(
    interpreted: Backend, operation: tuple[str, Make]
) -> None:
    name, make = operation
    site = make_site(make, torch.float32, 36, (12,))
    check(getattr(interpreted.deltas, name), site, torch.float32, 130, [(0, 129, 0, 1.0)])


GPU_OPERATIONS = {
    "dense": ADD_DENSE,
    "sparse": ADD_SPARSE,
    "kronecker": ADD_KRONECKER,
    "kronecker-rank-19": ADD_KRONECKER,
    "circulant-12": ADD_CIRCULANT,
    "output-rows": REPLACE_OUTPUTS,
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", GPU_OPERATIONS)
def test_on_a_gpu_every_configuration_computes_the_same(case: str) -> None:
    correction, (name, make) = GPU_OPERATIONS[case], OPERATIONS[case]
    site = make_site(make, torch.bfloat16, 60, (24,))
    for config in range(correction.num_configs):
        measured = {name: {Key.of(7, MAX_INNER, 60): config}}
        check(placed(correction.tuned(measured)), site, torch.bfloat16, 8, [(0, 7, 0, 1.0)])


@pytest.mark.parametrize("block", [4, 1024])
def test_a_captured_spectral_step_has_rows_of_no_segment(
    monkeypatch: pytest.MonkeyPatch, interpreted: Backend, dtype: torch.dtype, block: int
) -> None:
    """Rows are transformed in blocks, whose ends are not those of segments."""
    monkeypatch.setattr(spectral_gpu, "BLOCK", block)
    site = make_site(spectral, dtype, 60, (20, 30), slots=3)
    groups = [(1, 2, 0, 1.0), (2, 2, 2, 1.0), (3, 9, 1, 0.5), (10, 12, 2, 1.0), (0, 0, 0, 0.0)]
    padding = torch.tensor([0, 2, 9, 12, 12, 12])
    check(interpreted.deltas.add_spectral, site, dtype, 13, groups, padding)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 16, 17, 65, 130])
def test_every_number_of_rows(
    compiled: Backend, operation: tuple[str, Make], dtype: torch.dtype, rows: int
) -> None:
    name, make = operation
    site = make_site(make, dtype, 60, (60, 90))
    check(getattr(compiled.deltas, name), site, dtype, rows, [(0, rows, 0, 1.0)])


@pytest.mark.parametrize(
    ("block", "in_size", "width"),
    [(32, 96, 544), (64, 1536, 1216), (96, 192, 96), (160, 320, 160)],
)
def test_circulant_blocks_that_fit_the_matrix_unit(
    compiled: Backend, dtype: torch.dtype, block: int, in_size: int, width: int
) -> None:
    """Of one strip of columns and more, and of more inputs than are made into tiles at once."""
    site = make_site(circulant(block), dtype, in_size, (width,))
    check(compiled.deltas.add_circulant, site, dtype, 19, [(0, 1, 0, -0.5), (1, 19, 0, 1.0)])
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(19, in_size, generator=rng).to(dtype)
    together, alone = torch.zeros(2, 19, width, dtype=dtype)
    for y, first in ((together, 0), (alone, 18)):
        segments = segments_of([(first, 19, 0, 1.0)])
        compiled.deltas.add_circulant(y, x, site.table, site.targets, segments)
    assert same_bits(alone[18], together[18])


@pytest.mark.parametrize("blocks", [(64, 64, 64), (32, 64, 128)])
def test_circulant_kernels_that_adjoin_give_the_bits_of_those_apart(
    compiled: Backend, dtype: torch.dtype, blocks: tuple[int, ...]
) -> None:
    """Those of several targets share tiles where they lie in one piece, last target first."""
    in_size, widths = 128, (256, 128, 1280)
    counts = [width // b for width, b in zip(widths, blocks, strict=True)]
    rng, pool = torch.Generator().manual_seed(6), Pool(dtype)
    kernels = randn(pool, rng, sum(counts), in_size)
    start, row = pool.put(kernels), sum(counts)
    adjoining, apart = {}, {}
    for t, (b, count) in enumerate(zip(blocks, counts, strict=True)):
        row -= count
        adjoining[t, 0] = CirculantCell(b, start + row * in_size)
        apart[t, 0] = CirculantCell(b, pool.put(kernels[row : row + count]))
    targets, segments = SiteTargets(FIRST, (0, 257, 386), widths), segments_of([(1, 7, 0, 0.5)])
    x = torch.randn(8, in_size, generator=rng).to(dtype)
    in_tiles, alone = torch.zeros(2, 8, 1666, dtype=dtype)
    for y, cells in ((in_tiles, adjoining), (alone, apart)):
        compiled.deltas.add_circulant(y, x, pool.table(3, 1, cells), targets, segments)
    assert in_tiles.any()
    assert same_bits(in_tiles, alone)


@pytest.mark.parametrize(
    ("in_size", "widths"),
    [(576, (576, 192)), (1536, (576,)), (912, (4620,)), (1295, (1326, 2)), (2, (4480,))],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_kronecker_factors_of_several_tiles(
    compiled: Backend,
    dtype: torch.dtype,
    in_size: int,
    widths: tuple[int, ...],
    swapped: bool,
) -> None:
    """Sizes that tiles divide, others and odd ones; at one site R is whole and factored."""
    whole, factored = kronecker(0, swapped), kronecker(3, swapped)
    made = 0

    def in_turns(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
        nonlocal made
        made += 1
        return (factored if made % 3 == 2 else whole)(pool, rng, in_size, out_size)

    site = make_site(in_turns, dtype, in_size, widths, slots=3)
    groups = [(0, 1, 0, 1.0), (1, 2, 1, -0.5), (2, 21, 0, 1.5), (21, 22, 2, 1.0), (22, 23, 0, 1.0)]
    check(compiled.deltas.add_kronecker, site, dtype, 24, groups)
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(24, in_size, generator=rng).to(dtype)
    together, alone = torch.zeros(2, 24, site.out_size, dtype=dtype)
    compiled.deltas.add_kronecker(together, x, site.table, site.targets, segments_of(groups))
    for row, slot, weight in ((0, 0, 1.0), (1, 1, -0.5), (20, 0, 1.5), (21, 2, 1.0)):
        segments = segments_of([(row, row + 1, slot, weight)])
        compiled.deltas.add_kronecker(alone, x, site.table, site.targets, segments)
        assert same_bits(alone[row], together[row])


def test_kronecker_factors_of_no_inputs(compiled: Backend, dtype: torch.dtype) -> None:
    site = make_site(kronecker(0), dtype, 12, (12,))
    y = torch.ones(3, 12, dtype=dtype)
    segments = segments_of([(0, 3, 0, 1.0)])
    compiled.deltas.add_kronecker(y, y[:, :0], site.table, site.targets, segments)
    assert torch.equal(y, torch.ones(3, 12, dtype=dtype))


@pytest.mark.parametrize("backend", ["compiled", "reference", "interpreted"])
def test_no_segments_and_no_targets(
    request: pytest.FixtureRequest, backend: str, operation: tuple[str, Make], dtype: torch.dtype
) -> None:
    name, make = operation
    deltas = request.getfixturevalue(backend).deltas
    site = make_site(make, dtype, 12, (12,))
    check(getattr(deltas, name), site, dtype, 3, [])
    rng = torch.Generator().manual_seed(2)
    x, y = strided_rows(3, 12, dtype, rng), strided_rows(3, 12, dtype, rng)
    before, nothing = y.clone(), replace(site.targets, out_starts=(), out_sizes=())
    getattr(deltas, name)(y, x, site.table, nothing, segments_of([(0, 3, 0, 1.0)]))
    assert same_bits(y, before)


@pytest.mark.parametrize("in_size", [60, 192])
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    compiled: Backend, operation: tuple[str, Make], dtype: torch.dtype, in_size: int
) -> None:
    name, make = operation
    correct: CorrectLinear = getattr(compiled.deltas, name)
    site = make_site(make, dtype, in_size, (192, 60), slots=2)
    rng = torch.Generator().manual_seed(3)
    x, y = torch.randn(70, in_size, generator=rng).to(dtype), torch.zeros(70, 253, dtype=dtype)
    together = y.clone()
    groups = [(0, 67, 0, 0.75), (67, 70, 1, 1.0)]
    with num_threads(2):
        correct(together, x, site.table, site.targets, segments_of(groups))
    for row in range(70):
        alone = y[row : row + 1].clone()
        segment = segments_of([(0, 1, int(row >= 67), 0.75 if row < 67 else 1.0)])
        correct(alone, x[row : row + 1], site.table, site.targets, segment)
        assert same_bits(alone, together[row : row + 1])


@pytest.mark.parametrize("backend", ["compiled", "interpreted"])
def test_a_nan_stays_in_its_row(
    request: pytest.FixtureRequest, backend: str, operation: tuple[str, Make], dtype: torch.dtype
) -> None:
    deltas = request.getfixturevalue(backend).deltas
    name, make = operation
    site = make_site(make, dtype, 60, (60,))
    rng = torch.Generator().manual_seed(4)
    x, y = strided_rows(9, 60, dtype, rng), strided_rows(9, 60, dtype, rng)
    x[4] = float("nan")
    getattr(deltas, name)(y, x, site.table, site.targets, segments_of([(0, 9, 0, 1.0)]))
    touched = site.deltas[0, 0].weight.numel() and site.deltas[0, 0].weight.any()
    assert y.isnan().any(1).tolist() == [row == 4 and bool(touched) for row in range(9)]


@pytest.mark.parametrize(
    "group", [(0, 4, 0, 1.0), (-1, 2, 0, 1.0), (2, 1, 0, 1.0), (0, 1, 1, 1.0), (0, 1, -1, 1.0)]
)
def test_segments_that_reach_outside_are_refused(
    compiled: Backend, operation: tuple[str, Make], group: tuple[int, int, int, float]
) -> None:
    name, make = operation
    site = make_site(make, torch.float32, 12, (12,))
    x, y = torch.ones(3, 12), torch.ones(3, 12)
    with pytest.raises(IndexError):
        getattr(compiled.deltas, name)(y, x, site.table, site.targets, segments_of([group]))
    assert torch.equal(y, torch.ones(3, 12))


OFFSETS = {
    "add_dense": (0,),
    "add_sparse": (1, 2, 3),
    "add_spectral": (1, 2, 3),
    "add_kronecker": (3, 4, 5),
    "add_circulant": (1,),
    "replace_outputs": (1, 2),
}


@pytest.mark.parametrize("offset", [-2, 1 << 40, (1 << 63) - 1, "last"])
@pytest.mark.parametrize("case", ["dense", "sparse", "spectral", "kronecker-rank-5-swapped",
                                  "circulant", "output-rows"])  # fmt: skip
def test_offsets_outside_the_pool_are_refused(
    deltas: DeltaOps, case: str, offset: int | str
) -> None:
    name, make = OPERATIONS[case]
    site = make_site(make, torch.float32, 12, (12,))
    for field in OFFSETS[name]:
        if field == 0 and offset == -2:
            continue  # an empty cell
        cells = site.table.cells.clone()
        cells[FIRST, 0, field] = site.table.numbers.numel() - 1 if offset == "last" else offset
        x, y = torch.ones(3, 12), torch.ones(3, 12)
        table = replace(site.table, cells=cells)
        with pytest.raises(IndexError):
            getattr(deltas, name)(y, x, table, site.targets, segments_of([(0, 3, 0, 1.0)]))
        assert torch.equal(y, torch.ones(3, 12))


@pytest.mark.parametrize(
    ("case", "field", "value", "words"),
    [
        ("sparse", 0, 1 << 62, "outside the pool"),
        ("output-rows", 0, (1 << 62) + 1, "outside the pool"),
        ("kronecker", 0, 5, "do not divide"),
        ("kronecker", 1, 0, "do not divide"),
        ("kronecker-rank-1", 2, 1 << 62, "outside the pool"),
        ("kronecker-rank-1", 2, -3, "outside the pool"),
        ("circulant", 0, 5, "does not divide"),
        ("circulant", 0, 0, "does not divide"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    compiled: Backend, case: str, field: int, value: int, words: str
) -> None:
    name, make = OPERATIONS[case]
    site = make_site(make, torch.float32, 12, (12,))
    site.table.cells[FIRST, 0, field] = value
    x, y = torch.ones(3, 12), torch.ones(3, 12)
    with pytest.raises(IndexError, match=words):
        getattr(compiled.deltas, name)(
            y, x, site.table, site.targets, segments_of([(0, 3, 0, 1.0)])
        )
    assert torch.equal(y, torch.ones(3, 12))


@pytest.mark.parametrize(
    ("case", "field", "at", "value", "words"),
    [
        ("sparse", 2, 3, 12, "column outside the input"),
        ("sparse", 2, 0, -1, "column outside the input"),
        ("sparse", 1, 5, -4, "row starts"),
        ("sparse", 1, 12, 1000, "row starts"),
        ("spectral", 2, 3, 12, "column outside the input"),
        ("output-rows", 1, 11, 12, "outside the target"),
        ("output-rows", 1, 0, -1, "outside the target"),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_indices_that_reach_outside_are_refused(
    compiled: Backend, case: str, field: int, at: int, value: int, words: str, rows: int
) -> None:
    name, make = OPERATIONS[case]
    site = make_site(make, torch.float32, 12, (12,))
    site.table.indices[site.table.cells[FIRST, 0, field] + at] = value
    x, y = torch.ones(rows, 12), torch.ones(rows, 12)
    with pytest.raises(IndexError, match=words):
        getattr(compiled.deltas, name)(
            y, x, site.table, site.targets, segments_of([(0, rows, 0, 1.0)])
        )


def test_tables_and_targets_that_do_not_fit_are_refused(
    compiled: Backend, operation: tuple[str, Make]
) -> None:
    name, make = operation
    correct: CorrectLinear = getattr(compiled.deltas, name)
    site = make_site(make, torch.float32, 12, (12,))
    segments = segments_of([(0, 3, 0, 1.0)])
    x, y = torch.ones(3, 12), torch.ones(3, 12)
    cells = site.table.cells
    short = replace(site.table, cells=cells[:, :, : cells.shape[2] // 2].contiguous())
    long = replace(site.table, cells=cells.int())
    beyond = replace(site.targets, first=FIRST + 1)
    wide = replace(site.targets, out_starts=(1,))
    with pytest.raises(IndexError):
        correct(y, x, site.table, beyond, segments)
    with pytest.raises(IndexError):
        correct(y, x, site.table, wide, segments)
    with pytest.raises(IndexError):
        correct(y, x, short, site.targets, segments)
    with pytest.raises(ValueError, match="cells must be"):
        correct(y, x, long, site.targets, segments)
    assert torch.equal(y, torch.ones(3, 12))


def test_on_a_gpu_only_a_sparse_product_takes_float32_rows_over_bfloat16_weights(
    interpreted: Backend,
) -> None:
    rows, segments = torch.ones(3, 12), segments_of([(0, 3, 0, 1.0)])
    for case in ("sparse", "dense"):
        name, make = OPERATIONS[case]
        site = make_site(make, torch.bfloat16, 12, (12,))
        correct: CorrectLinear = getattr(interpreted.deltas, name)
        if case == "sparse":
            y = rows.clone()
            correct(y, rows, site.table, site.targets, segments)
            exact, magnitude = expected(site, rows, rows, [(0, 3, 0, 1.0)])
            assert_close(y, exact, magnitude)
        else:
            with pytest.raises(ValueError, match="bfloat16"):
                correct(rows, rows, site.table, site.targets, segments)


SPECTRAL_SIZES = (
    (2, (1009, 4)),  # a prime that is transformed by its definition
    (1009, (2, 1)),
    (2 * 19 * 19, (16, 50, 3)),
    (7 * 9, (7 * 25, 49)),
    (1536, (576,)),
    (576, (1536, 192)),
    (8 * 43, (8 * 43,)),
    (2 * 5 * 9 * 12, (2 * 8 * 12, 2 * 6 * 7, 3 * 3 * 3)),
    (5, (18, 16, 45)),
)


@pytest.mark.parametrize(("in_size", "widths"), SPECTRAL_SIZES)
@pytest.mark.parametrize("rows_each", [1, 5])
def test_transforms_of_any_size(
    compiled: Backend, dtype: torch.dtype, in_size: int, widths: tuple[int, ...], rows_each: int
) -> None:
    site = make_site(spectral, dtype, in_size, widths, slots=2)
    groups = [(0, rows_each, 0, 1.0), (rows_each, 2 * rows_each, 1, -0.5)]
    check(compiled.deltas.add_spectral, site, dtype, 2 * rows_each, groups)


def with_places_of_the_first(pool: Pool, rng: torch.Generator, i: int, o: int) -> Delta:
    """Frequencies that stand where every other call's do, but are others."""
    mask = torch.rand(o, i, generator=torch.Generator().manual_seed(5)) < 0.2
    spectrum = randn(pool, rng, o, i) * mask
    starts = torch.cat((torch.zeros(1), mask.sum(1).cumsum(0))).int()
    columns, values = mask.nonzero()[:, 1].int(), spectrum[mask]
    cell = SparseCell(values.numel(), pool.put(starts), pool.put(columns), pool.put(values))
    weight, terms = torch.fft.ifft2(spectrum.double()).real, spectrum.double().abs().mean()
    return Delta(cell, weight, terms.expand(weight.shape))


@pytest.mark.parametrize("rows_each", [1, 2, 4, 8])
@pytest.mark.parametrize("frequencies", [40, 1500])
def test_targets_of_one_size_share_where_frequencies_stand(
    compiled: Backend, dtype: torch.dtype, rows_each: int, frequencies: int
) -> None:
    """The last target's stand elsewhere, where only one of the adapters has any."""
    shared: dict[tuple[int, int], tuple[int, int, Tensor]] = {}
    calls = iter(range(5))

    def make(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
        own = next(calls) == 4
        if own or (out_size, in_size) not in shared:
            places = torch.randperm(out_size * in_size, generator=rng)[:frequencies].sort().values
            counts = torch.bincount(places // in_size, minlength=out_size).cumsum(0)
            starts = torch.cat((counts.new_zeros(1), counts)).int()
            put = (pool.put(starts), pool.put((places % in_size).int()), places)
            shared.setdefault((out_size, in_size), put)
        else:
            put = shared[out_size, in_size]
        values = randn(pool, rng, frequencies)
        spectrum = torch.zeros(out_size * in_size, dtype=torch.float64)
        spectrum[put[2]] = values.double()
        spectrum = spectrum.view(out_size, in_size)
        cell = SparseCell(frequencies, *put[:2], pool.put(values))
        weight, terms = torch.fft.ifft2(spectrum).real, spectrum.abs().mean()
        return Delta(cell, weight, terms.expand(weight.shape))

    site = make_site(make, dtype, 48, (64, 64, 64), slots=2)
    groups = [(0, rows_each, 0, 1.0), (rows_each, 2 * rows_each, 1, -0.5)]
    check(compiled.deltas.add_spectral, site, dtype, 2 * rows_each, groups)


@pytest.mark.parametrize("seventh", [spectral, with_places_of_the_first])
def test_adapters_whose_frequencies_stand_at_the_same_places(
    compiled: Backend, dtype: torch.dtype, seventh: Make
) -> None:
    """They are multiplied side by side, and so are those that have nothing at one of the targets.

    The seventh is at the second target.
    """
    made = iter([*[with_places_of_the_first] * 6, seventh, *[with_places_of_the_first] * 7])

    def make(pool: Pool, rng: torch.Generator, in_size: int, out_size: int) -> Delta:
        return next(made)(pool, rng, in_size, out_size)

    site = make_site(make, dtype, 60, (70, 96), slots=7)
    groups = [(slot, slot + 1, slot, 1.0 + slot) for slot in range(7)]
    correct = compiled.deltas.add_spectral
    check(correct, site, dtype, 7, groups)
    rng = torch.Generator().manual_seed(6)
    x, y = torch.randn(7, 60, generator=rng).to(dtype), torch.zeros(7, 167, dtype=dtype)
    x[2] = float("nan")
    together = y.clone()
    with num_threads(1):
        correct(together, x, site.table, site.targets, segments_of(groups))
    for row, _, slot, weight in groups[:2] + groups[3:]:
        alone = y[:1].clone()
        segments = segments_of([(0, 1, slot, weight)])
        correct(alone, x[row : row + 1], site.table, site.targets, segments)
        assert same_bits(alone, together[row : row + 1])
