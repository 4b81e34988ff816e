"""add_low_rank: every row gets its own adapter's delta, and nothing else is touched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from deltamux.kernels.backend import Backend
from deltamux.kernels.low_rank.op import LowRankTable, Segments, SiteTargets

from .compare import assert_close, same_bits

NAN = float("nan")
RANKS = (1, 2, 3, 4, 16, 63, 64, 256)


@dataclass(frozen=True)
class Site:
    """One GEMM with its adapters in a poisoned pool."""

    in_size: int
    widths: tuple[int, ...]
    table: LowRankTable
    targets: SiteTargets

    @property
    def out_size(self) -> int:
        return sum(self.widths)


def make_site(
    dtype: torch.dtype,
    in_size: int,
    widths: Sequence[int],
    ranks: Sequence[Sequence[int]],
    seed: int = 0,
) -> Site:
    """ranks[target][slot]; every third cell has a bias. NaN fills the gaps between the weights."""
    rng = torch.Generator().manual_seed(0)
    first = 2  # rows of other sites come before, with offsets that must not be followed
    shape = (first + len(widths), len(ranks[0]))
    rank = torch.full(shape, 1 << 20, dtype=torch.int32)
    a_offset, b_offset, bias_offset = (torch.full(shape, -1, dtype=torch.int64) for _ in range(3))
    parts: list[Tensor] = []
    used = 0

    def put(count: int, scale: float) -> int:
        nonlocal used
        gap = torch.full((5,), NAN)
        parts.extend((gap, torch.randn(count, generator=rng) * scale))
        used += 5 + count
        return used - count

    for t, width in enumerate(widths):
        for slot, r in enumerate(ranks[t]):
            cell = (first + t, slot)
            rank[cell] = r
            if r:
                a_offset[cell] = put(r * in_size, in_size**-0.5)
                b_offset[cell] = put(r * width, 1.0)
            if (t + slot) % 3 == 0:
                bias_offset[cell] = put(width, 1.0)
    pool = torch.cat([*parts, torch.full((7,), NAN)]).to(dtype)
    starts = tuple(sum(widths[:t]) for t in range(len(widths)))
    table = LowRankTable(pool, rank, a_offset, b_offset, bias_offset)
    return Site(in_size, tuple(widths), table, SiteTargets(first, starts, tuple(widths)))


def segments_of(groups: Sequence[tuple[int, int, int]]) -> Segments:
    start, end, slot = (
        torch.tensor(column, dtype=torch.int32) for column in zip(*groups, strict=True)
    )
    return Segments(start, end, slot)


def rows_of(site: Site, rows: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x and y as strided views into wider buffers full of NaN."""
    rng = torch.Generator().manual_seed(seed)
    views = []
    for size in (site.in_size, site.out_size):
        wide = torch.full((rows, size + 9), NAN, dtype=dtype)
        view = wide[:, 3 : 3 + size]
        view.copy_(torch.randn(rows, size, generator=rng))
        views.append(view)
    return views[0], views[1]


def deltas(site: Site, x: Tensor, slot: int) -> tuple[Tensor, Tensor]:
    """The exact delta of rows x for a slot, and the sum of its terms' magnitudes."""
    table = site.table
    out, magnitude = [], []
    for t, width in enumerate(site.widths):
        cell = (site.targets.first + t, slot)
        r = int(table.rank[cell])
        delta, terms = torch.zeros(len(x), width), torch.zeros(len(x), width)
        if r:
            at, bt = int(table.a_offset[cell]), int(table.b_offset[cell])
            a = table.pool[at : at + r * site.in_size].view(r, -1).double()
            b = table.pool[bt : bt + r * width].view(r, -1).double()
            delta = (x.double() @ a.T @ b).float()
            terms = (x.double().abs() @ a.abs().T @ b.abs()).float()
        if (ct := int(table.bias_offset[cell])) >= 0:
            delta = delta + table.pool[ct : ct + width].float()
        out.append(delta)
        magnitude.append(terms + delta.abs())
    return torch.cat(out, 1), torch.cat(magnitude, 1)


def check(backend: Backend, site: Site, rows: int, groups: Sequence[tuple[int, int, int]]) -> None:
    x, y = rows_of(site, rows, site.table.pool.dtype)
    x[[row for row in range(rows) if not any(s <= row < e for s, e, _ in groups)]] = NAN
    before, outside = y.clone(), y._base
    assert outside is not None
    poison = outside.clone()
    backend.add_low_rank(y, x, site.table, site.targets, segments_of(groups))
    touched = torch.zeros(rows, dtype=torch.bool)
    for start, end, slot in groups:
        touched[start:end] = True
        if start < end:
            delta, magnitude = deltas(site, x[start:end], slot)
            exact = before[start:end].float() + delta
            assert_close(y[start:end], exact, magnitude + before[start:end].float().abs())
    assert same_bits(y[~touched], before[~touched])
    poison[:, 3 : 3 + site.out_size] = y
    assert same_bits(outside, poison), "columns beside the view were written"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("in_size", "width"), [(576, 192), (60, 60), (7, 1), (33, 130)])
def test_every_rank_and_width(
    compiled: Backend, dtype: torch.dtype, rank: int, in_size: int, width: int
) -> None:
    site = make_site(dtype, in_size, [width], [[rank, rank]])
    check(compiled, site, 63, [(0, 1, 0), (1, 4, 1), (5, 63, 0)])


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 63, 300])
def test_one_adapter_over_all_targets(compiled: Backend, dtype: torch.dtype, rows: int) -> None:
    site = make_site(dtype, 576, [576, 192, 192], [[16], [0], [5]])
    check(compiled, site, rows, [(0, rows, 0)])


def test_all_ranks_in_one_call(compiled: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [60, 20], [RANKS, RANKS[::-1]])
    check(compiled, site, 2 * len(RANKS), [(2 * s, 2 * s + 2, s) for s in range(len(RANKS))])


def test_zipf_popularity_with_half_the_rows_on_the_base(
    compiled: Backend, dtype: torch.dtype
) -> None:
    site = make_site(dtype, 576, [192], [[1 + 7 * s for s in range(20)]])
    groups, row = [], 128
    for slot in range(20):
        count = max(1, 40 // (slot + 1))
        groups.append((row, row + count, slot))
        row += count
    check(compiled, site, row, groups)


def test_empty_segments_and_no_targets(compiled: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [60], [[4, 0]])
    check(compiled, site, 3, [(0, 0, 0), (1, 2, 1), (3, 3, 1)])
    nothing = replace(site.targets, out_starts=(), out_sizes=())
    x, y = rows_of(site, 3, dtype)
    before = y.clone()
    compiled.add_low_rank(y, x, site.table, nothing, segments_of([(0, 3, 0)]))
    assert same_bits(y, before)


@pytest.mark.parametrize("in_size", [60, 576])
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    compiled: Backend, dtype: torch.dtype, in_size: int
) -> None:
    site = make_site(dtype, in_size, [192, 60], [[16, 63], [3, 4]])
    x, y = rows_of(site, 70, dtype)
    together = y.clone()
    compiled.add_low_rank(
        together, x, site.table, site.targets, segments_of([(0, 67, 0), (67, 70, 1)])
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for row in range(70):
            alone = y[row : row + 1].clone()
            slot = segments_of([(0, 1, int(row >= 67))])
            compiled.add_low_rank(alone, x[row : row + 1], site.table, site.targets, slot)
            assert same_bits(alone, together[row : row + 1])


def test_a_nan_stays_in_its_row(compiled: Backend, dtype: torch.dtype) -> None:
    site = make_site(dtype, 60, [60], [[4]])
    x, y = rows_of(site, 9, dtype)
    x[4, 7] = NAN
    compiled.add_low_rank(y, x, site.table, site.targets, segments_of([(0, 9, 0)]))
    assert y.isnan().any(1).tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([(0, 4, 0)], "outside the batch's rows"),
        ([(-1, 2, 0)], "outside the batch's rows"),
        ([(2, 1, 0)], "outside the batch's rows"),
        ([(0, 1, 2)], "adapter slot outside the table"),
    ],
)
def test_segments_that_reach_outside_are_refused(
    compiled: Backend, groups: list[tuple[int, int, int]], words: str
) -> None:
    site = make_site(torch.float32, 8, [8], [[1, 1]])
    x, y = rows_of(site, 3, torch.float32)
    before = y.clone()
    with pytest.raises(IndexError, match=words):
        compiled.add_low_rank(y, x, site.table, site.targets, segments_of(groups))
    assert same_bits(y, before)


def test_weights_outside_the_pool_are_refused(compiled: Backend) -> None:
    site = make_site(torch.float32, 8, [8], [[4]])
    x, y = rows_of(site, 3, torch.float32)
    short = replace(site.table, pool=site.table.pool[:40].clone())
    with pytest.raises(IndexError, match="outside the pool"):
        compiled.add_low_rank(y, x, short, site.targets, segments_of([(0, 3, 0)]))


def test_wrong_tensors_are_refused_by_what_is_wrong(compiled: Backend) -> None:
    site = make_site(torch.float32, 8, [8], [[4]])
    x, y = rows_of(site, 3, torch.float32)
    segments = segments_of([(0, 3, 0)])
    half = replace(site.table, pool=site.table.pool.half())
    wide = replace(site.table, rank=site.table.rank.long())
    with pytest.raises(ValueError, match="bfloat16"):
        compiled.add_low_rank(y, x.bfloat16(), site.table, site.targets, segments)
    with pytest.raises(ValueError, match="float16; run the model in float32 or bfloat16"):
        compiled.add_low_rank(y.half(), x.half(), half, site.targets, segments)
    with pytest.raises(ValueError, match="differ in rows"):
        compiled.add_low_rank(y, x[:2], site.table, site.targets, segments)
    with pytest.raises(ValueError, match="strides"):
        compiled.add_low_rank(y, x.T.contiguous().T, site.table, site.targets, segments)
    with pytest.raises(ValueError, match="rank must be"):
        compiled.add_low_rank(y, x, wide, site.targets, segments)
