"""The formula of ``op`` in plain torch: the oracle of every faster version, in float32."""

from torch import Tensor

from .op import LowRankTable, Segments, SiteTargets


def add_low_rank(
    y: Tensor, x: Tensor, table: LowRankTable, targets: SiteTargets, segments: Segments
) -> None:
    """y[i:j, columns(t)] += (x[i:j] @ A(t, s).T) @ B(t, s) + c(t, s), accumulated in float32."""
    for start, end, slot in zip(
        segments.start.tolist(), segments.end.tolist(), segments.adapter_slot.tolist(), strict=True
    ):
        for position, (column, width) in enumerate(
            zip(targets.out_starts, targets.out_sizes, strict=True)
        ):
            out = y[start:end, column : column + width]
            delta = _delta(x[start:end], table, targets.first + position, slot, width)
            if delta is not None:
                out.copy_(out.float() + delta)


def _delta(x: Tensor, table: LowRankTable, target: int, slot: int, width: int) -> Tensor | None:
    rank = int(table.rank[target, slot])
    bias_offset = int(table.bias_offset[target, slot])
    delta: Tensor | None = None
    if rank:
        a = _rows(table.pool, int(table.a_offset[target, slot]), rank, x.shape[1])
        b = _rows(table.pool, int(table.b_offset[target, slot]), rank, width)
        delta = (x.float() @ a.T) @ b
    if bias_offset >= 0:
        bias = table.pool[bias_offset : bias_offset + width].float()
        delta = bias if delta is None else delta + bias
    return delta


def _rows(pool: Tensor, offset: int, rows: int, width: int) -> Tensor:
    return pool[offset : offset + rows * width].view(rows, width).float()
