"""correct_affine: every row gets its own adapter's correction, and nothing else is touched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from deltamux.kernels.affine.op import Cell
from deltamux.kernels.backend import Backend
from deltamux.kernels.tables import PrimitiveTable, SiteTargets

from .compare import assert_close, same_bits
from .pools import FIRST, NAN, Pool, num_threads, poison_outside, segments_of, strided_rows

RANKS = (1, 2, 3, 4, 16, 63, 64, 256)
Groups = Sequence[tuple[int, int, int, float]]


@dataclass(frozen=True)
class Part:
    """One adapter on one target; c and g may be missing."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: Tensor | None


@dataclass(frozen=True)
class Site:
    """One GEMM with its adapters in a poisoned pool; ``parts[target, slot]``."""

    in_size: int
    widths: tuple[int, ...]
    table: PrimitiveTable
    targets: SiteTargets
    parts: dict[tuple[int, int], Part]

    @property
    def out_size(self) -> int:
        return sum(self.widths)


def make_site(
    dtype: torch.dtype, in_size: int, widths: Sequence[int], ranks: Sequence[Sequence[int]]
) -> Site:
    """ranks[target][slot]; every third cell has a bias, every fourth a scale; some are empty."""
    rng, pool, parts, cells = torch.Generator().manual_seed(0), Pool(dtype), {}, {}

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    for t, width in enumerate(widths):
        for slot, rank in enumerate(ranks[t]):
            place, number = (t, slot), t + slot
            part = parts[place] = Part(
                randn(rank, in_size, scale=in_size**-0.5),
                randn(rank, width),
                randn(width) if number % 3 == 0 else None,
                randn(width) if number % 4 == 1 else None,
            )
            if rank or part.bias is not None or part.scale is not None:
                tensors = (
                    part.a if rank else None,
                    part.b if rank else None,
                    part.bias,
                    part.scale,
                )
                cells[place] = Cell(rank, *(-1 if v is None else pool.put(v) for v in tensors))
    starts = tuple(sum(widths[:t]) for t in range(len(widths)))
    targets = SiteTargets(FIRST, starts, tuple(widths))
    table = pool.table(len(widths), len(ranks[0]), cells)
    return Site(in_size, tuple(widths), table, targets, parts)


def rows_of(site: Site, rows: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x and y as strided views into wider buffers full of NaN."""
    rng = torch.Generator().manual_seed(seed)
    return strided_rows(rows, site.in_size, dtype, rng), strided_rows(
        rows, site.out_size, dtype, rng
    )


def corrected(site: Site, y: Tensor, x: Tensor, slot: int, w: float) -> tuple[Tensor, Tensor]:
    """The exact result for rows y and x of a slot, and the sum of its terms' magnitudes."""
    out, magnitude = y.double().clone(), y.double().abs()
    for t, (first, width) in enumerate(
        zip(site.targets.out_starts, site.targets.out_sizes, strict=True)
    ):
        part, columns = site.parts[t, slot], slice(first, first + width)
        a, b = part.a.double(), part.b.double()
        if part.scale is not None:
            out[:, columns] *= part.scale
            magnitude[:, columns] *= part.scale.abs()
        out[:, columns] += w * (x.double() @ a.T @ b)
        magnitude[:, columns] += abs(w) * (x.double().abs() @ a.abs().T @ b.abs())
        if part.bias is not None:
            out[:, columns] += w * part.bias.double()
            magnitude[:, columns] += abs(w) * part.bias.double().abs()
    return out.float(), magnitude.float()


def check(backend: Backend, site: Site, rows: int, groups: Groups) -> None:
    x, y = rows_of(site, rows, site.table.numbers.dtype)
    touched = poison_outside(x, groups)
    before, outside = y.clone(), y._base
    assert outside is not None
    poison = outside.clone()
    with num_threads(2):
        backend.deltas.correct_affine(y, x, site.table, site.targets, segments_of(groups))
    for start, end, slot, w in groups:
        if start < end:
            assert_close(y[start:end], *corrected(site, before[start:end], x[start:end], slot, w))
    assert same_bits(y[~touched], before[~touched])
    poison[:, 3 : 3 + site.out_size] = y
    assert same_bits(outside, poison), "columns beside the view were written"


@pytest.fixture(params=["compiled", "reference", "interpreted"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("in_size", "width"), [(576, 192), (60, 60), (7, 1), (33, 130)])
def test_every_rank_and_width(
    backend: Backend, dtype: torch.dtype, rank: int, in_size: int, width: int
) -> None:
    site = make_site(dtype, in_size, [width], [[rank, rank]])
    check(backend, site, 63, [(0, 1, 0, 1.0), (1, 4, 1, 1.0), (5, 63, 0, -0.75)])


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 63, 300])
def test_one_adapter_over_all_targets(backend: Backend, dtype: torch.dtype, rows: int) -> None:
    site = make_site(dtype, 576, [576, 192, 192, 60], [[16], [0], [5], [0]])
    check(backend, site, rows, [(0, rows, 0, 1.0)])


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_inputs_that_many_programs_share(backend: Backend, dtype: torch.dtype, rows: int) -> None:
    """More planes than a GPU's expand reads at once."""
    site = make_site(dtype, 9000, [24, 8], [[3, 20], [20, 1]])
    check(backend, site, rows + 1, [(0, rows, 0, 1.0), (rows, rows + 1, 1, -0.5)])


def test_all_ranks_in_one_call(backend: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [60, 20], [RANKS, RANKS[::-1]])
    groups = [(2 * s, 2 * s + 2, s, 1.0 + s % 3) for s in range(len(RANKS))]
    check(backend, site, 2 * len(RANKS), groups)


def test_zipf_popularity_with_half_the_rows_on_the_base(
    backend: Backend, dtype: torch.dtype
) -> None:
    site = make_site(dtype, 576, [192], [[1 + 7 * s for s in range(20)]])
    groups, row = [], 128
    for slot in range(20):
        count = max(1, 40 // (slot + 1))
        groups.append((row, row + count, slot, 1.0))
        row += count
    check(backend, site, row, groups)


def test_empty_segments_and_no_targets(backend: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [60], [[4, 0]])
    check(backend, site, 3, [(0, 0, 0, 1.0), (1, 2, 1, 1.0), (3, 3, 1, 1.0)])
    nothing = replace(site.targets, out_starts=(), out_sizes=())
    x, y = rows_of(site, 3, dtype)
    before = y.clone()
    backend.deltas.correct_affine(y, x, site.table, nothing, segments_of([(0, 3, 0, 1.0)]))
    assert same_bits(y, before)


@pytest.mark.parametrize("in_size", [60, 576])
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    compiled: Backend, dtype: torch.dtype, in_size: int
) -> None:
    site = make_site(dtype, in_size, [192, 60], [[16, 63], [3, 4]])
    x, y = rows_of(site, 70, dtype)
    together = y.clone()
    groups = [(0, 67, 0, 0.5), (67, 70, 1, 1.0)]
    with num_threads(2):
        compiled.deltas.correct_affine(together, x, site.table, site.targets, segments_of(groups))
    for row in range(70):
        alone = y[row : row + 1].clone()
        slot = segments_of([(0, 1, 0, 0.5) if row < 67 else (0, 1, 1, 1.0)])
        compiled.deltas.correct_affine(alone, x[row : row + 1], site.table, site.targets, slot)
        assert same_bits(alone, together[row : row + 1])


def test_a_nan_stays_in_its_row(compiled: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [60], [[4]])
    x, y = rows_of(site, 9, dtype)
    x[4, 7] = NAN
    compiled.deltas.correct_affine(y, x, site.table, site.targets, segments_of([(0, 9, 0, 1.0)]))
    assert y.isnan().any(1).tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([(0, 4, 0, 1.0)], "outside the batch's rows"),
        ([(-1, 2, 0, 1.0)], "outside the batch's rows"),
        ([(2, 1, 0, 1.0)], "outside the batch's rows"),
        ([(0, 1, 2, 1.0)], "adapter slot outside the table"),
    ],
)
def test_segments_that_reach_outside_are_refused(
    compiled: Backend, groups: Groups, words: str
) -> None:
    site = make_site(torch.float32, 8, [8], [[1, 1]])
    x, y = rows_of(site, 3, torch.float32)
    before = y.clone()
    with pytest.raises(IndexError, match=words):
        compiled.deltas.correct_affine(y, x, site.table, site.targets, segments_of(groups))
    assert same_bits(y, before)


def test_weights_outside_the_pool_are_refused(compiled: Backend) -> None:
    site = make_site(torch.float32, 8, [8], [[4]])
    x, y = rows_of(site, 3, torch.float32)
    short = replace(site.table, numbers=site.table.numbers[:40].clone())
    with pytest.raises(IndexError, match="outside the pool"):
        compiled.deltas.correct_affine(y, x, short, site.targets, segments_of([(0, 3, 0, 1.0)]))


def test_wrong_tensors_are_refused_by_what_is_wrong(compiled: Backend) -> None:
    site = make_site(torch.float32, 8, [8], [[4]])
    x, y = rows_of(site, 3, torch.float32)
    segments = segments_of([(0, 3, 0, 1.0)])
    half = replace(site.table, numbers=site.table.numbers.half())
    narrow = replace(site.table, cells=site.table.cells.int())
    with pytest.raises(ValueError, match="bfloat16"):
        compiled.deltas.correct_affine(y, x.bfloat16(), site.table, site.targets, segments)
    with pytest.raises(ValueError, match="float16; run the model in float32 or bfloat16"):
        compiled.deltas.correct_affine(y.half(), x.half(), half, site.targets, segments)
    with pytest.raises(ValueError, match="differ in rows"):
        compiled.deltas.correct_affine(y, x[:2], site.table, site.targets, segments)
    with pytest.raises(ValueError, match="strides"):
        compiled.deltas.correct_affine(y, x.T.contiguous().T, site.table, site.targets, segments)
    with pytest.raises(ValueError, match="cells must be"):
        compiled.deltas.correct_affine(y, x, narrow, site.targets, segments)
