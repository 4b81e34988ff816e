"""A step's plan as the index tensors that the model and the sampler read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...adapters.batch import group_rows
from ...kernels.low_rank.op import Segments
from ...kernels.paged_attention.op import PagedBatch
from ..scheduler.plan import ScheduledSequence, StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's rows, ordered so that the rows of each adapter are one segment.

    Attributes:
        items: The plan's sequences in the order of their rows.
        adapter_slots: Each item's adapter slot, None for the base.
        first_rows: Each item's first row.
        token_ids: (rows,) int64.
        positions: (rows,) int64.
        paged: Where rows lie in the KV cache.
        segments: Rows by adapter; None when all rows are the base's.
        sample_rows: (n,) int64, the last row of every item that samples, in the order of the items.
        sample_segments: Those n rows by adapter.
    """

    items: tuple[ScheduledSequence, ...]
    adapter_slots: tuple[int | None, ...]
    first_rows: tuple[int, ...]
    token_ids: Tensor
    positions: Tensor
    paged: PagedBatch
    segments: Segments | None
    sample_rows: Tensor
    sample_segments: Segments | None


def build_batch(
    plan: StepPlan, adapter_slot: Callable[[int], int], block_size: int, device: torch.device
) -> StepBatch:
    """The tensors of one step; ``adapter_slot`` maps an adapter id to its slot on the device."""
    slots = [_slot(item, adapter_slot) for item in plan.scheduled]
    order = sorted(range(len(slots)), key=lambda i: -1 if (slot := slots[i]) is None else slot)
    items = tuple(plan.scheduled[i] for i in order)
    slots = [slots[i] for i in order]

    bounds = np.cumsum([0, *(item.num_tokens for item in items)])
    positions = np.concatenate([np.arange(item.start, item.end) for item in items])
    token_ids = np.concatenate([item.sequence.token_ids[item.start : item.end] for item in items])
    sampling = [index for index, item in enumerate(items) if item.samples]
    return StepBatch(
        items=items,
        adapter_slots=tuple(slots),
        first_rows=tuple(bounds[:-1].tolist()),
        token_ids=_to(token_ids.astype(np.int64), device),
        positions=_to(positions, device),
        paged=_paged(items, bounds, positions, block_size, device),
        segments=make_segments(slots, bounds.tolist(), device),
        sample_rows=_to(bounds[1:][sampling] - 1, device),
        sample_segments=make_segments(
            [slots[index] for index in sampling], range(len(sampling) + 1), device
        ),
    )


def make_segments(
    adapter_slots: Sequence[int | None], bounds: Sequence[int], device: torch.device
) -> Segments | None:
    """Rows by adapter, or None without one; item i has rows ``bounds[i] .. bounds[i + 1]``."""
    groups = [(bounds[i], bounds[j], slot) for i, j, slot in group_rows(adapter_slots)]
    if not groups:
        return None
    start, end, slot = np.array(groups, dtype=np.int32).T.copy()
    return Segments(start=_to(start, device), end=_to(end, device), adapter_slot=_to(slot, device))


def _slot(item: ScheduledSequence, adapter_slot: Callable[[int], int]) -> int | None:
    adapter_id = item.sequence.request.adapter_id
    return None if adapter_id is None else adapter_slot(adapter_id)


def _paged(
    items: Sequence[ScheduledSequence],
    bounds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    block_size: int,
    device: torch.device,
) -> PagedBatch:
    context_lens = np.array([item.end for item in items], dtype=np.int32)
    max_blocks = -(-int(context_lens.max()) // block_size)
    tables = np.zeros((len(items), max_blocks), dtype=np.int32)
    for row, item in zip(tables, items, strict=True):
        used = -(-item.end // block_size)
        row[:used] = item.sequence.block_table[:used]
    sequence_of_row = np.repeat(np.arange(len(items)), np.diff(bounds))
    blocks = tables[sequence_of_row, positions // block_size].astype(np.int64)
    return PagedBatch(
        cu_seqlens_q=_to(bounds.astype(np.int32), device),
        context_lens=_to(context_lens, device),
        block_tables=_to(tables, device),
        slot_mapping=_to(blocks * block_size + positions % block_size, device),
    )


def _to(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
