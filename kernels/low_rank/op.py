"""Batched low-rank deltas: each row of a batch gets its own adapter's correction.

    y[i:j, columns(t)] += (x[i:j] @ A(t, s).T) @ B(t, s) + c(t, s)

for every segment (i, j, s) of rows that share adapter slot s, and every target t of a site. Ranks
are exact: a segment reads rank(t, s) rows of A and B and nothing else. Rows outside every segment
are neither read nor written. Punica (arXiv:2310.18547) named the two halves shrink and expand;
S-LoRA (arXiv:2311.03285) showed that unpadded ranks in one pool are enough.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows of one batch grouped by adapter slot; rows of the bare base lie in no segment.

    Attributes:
        start: (segments,) int32, first row.
        end: (segments,) int32, one past the last row.
        adapter_slot: (segments,) int32.
    """

    start: Tensor
    end: Tensor
    adapter_slot: Tensor


@dataclass(frozen=True, slots=True)
class LowRankTable:
    """Where each adapter slot's rank rows lie in the pool.

    Attributes:
        pool: (elements,) flat weights of all resident adapters, in the base's dtype.
        rank: (targets, adapter_slots) int32; 0 where the adapter leaves the target alone.
        a_offset: (targets, adapter_slots) int64, element where A (rank, in) starts.
        b_offset: (targets, adapter_slots) int64, element where B (rank, out) starts.
        bias_offset: (targets, adapter_slots) int64, element where c (out,) starts, -1 without one.
    """

    pool: Tensor
    rank: Tensor
    a_offset: Tensor
    b_offset: Tensor
    bias_offset: Tensor


@dataclass(frozen=True, slots=True)
class SiteTargets:
    """The targets of one GEMM: table rows ``first .. first + len(out_starts)``.

    Attributes:
        first: Table row of the first target.
        out_starts: First output column of each target.
        out_sizes: Output columns of each target.
    """

    first: int
    out_starts: tuple[int, ...]
    out_sizes: tuple[int, ...]


AddLowRank = Callable[[Tensor, Tensor, LowRankTable, SiteTargets, Segments], None]
"""add_low_rank(y, x, table, targets, segments): y (rows, out) is updated in place, x (rows, in)."""
