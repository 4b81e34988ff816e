"""A step's plan as the index tensors that the model and the sampler read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...adapters.device.batch import RowRange
from ...adapters.device.pool import Placement
from ...kernels.paged_attention.op import PagedBatch
from ..scheduler.plan import ScheduledSequence, StepPlan

FindAdapter = Callable[[int], Placement]
"""Where the adapter of an id is on the device."""


@dataclass(frozen=True, slots=True)
class _Correction:
    """Positions ``start .. end`` of a sequence that the part in one adapter slot corrects."""

    slot: int
    weight: float
    start: int
    end: int | None

    def rows(self, first_row: int, start: int, end: int) -> RowRange | None:
        """Those among the rows from ``first_row`` on that hold the positions ``start .. end``."""
        low = max(self.start, start)
        high = end if self.end is None else min(self.end, end)
        if low >= high:
            return None
        return RowRange(first_row + low - start, first_row + high - start, self.slot, self.weight)


@dataclass(frozen=True, slots=True)
class StepItem:
    """A scheduled sequence with its place in the batch.

    Attributes:
        scheduled: What the plan says of it.
        first_row: Its first row.
        corrections: What its adapters correct, by position.
    """

    scheduled: ScheduledSequence
    first_row: int
    corrections: tuple[_Correction, ...]

    def ranges(self, start: int, end: int, first_row: int) -> Iterator[RowRange | None]:
        """Per correction, the rows it corrects where rows from ``first_row`` hold positions."""
        return (each.rows(first_row, start, end) for each in self.corrections)


Passes = list[list[RowRange]]
"""Row ranges of adapters; within one pass none overlap."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's rows, ordered so that the rows of each adapter lie together.

    Attributes:
        items: The plan's sequences in the order of their rows.
        token_ids: (rows,) int64.
        positions: (rows,) int64.
        paged: Per layer, where rows lie in the KV cache.
        passes: The rows' adapters.
        sample_rows: (n,) int64, the last row of every item that samples, in the order of the items.
        sample_passes: The adapters of these n rows.
    """

    items: tuple[StepItem, ...]
    token_ids: Tensor
    positions: Tensor
    paged: Sequence[PagedBatch]
    passes: Passes
    sample_rows: Tensor
    sample_passes: Passes


def build_batch(
    plan: StepPlan,
    find_adapter: FindAdapter,
    num_layers: int,
    block_size: int,
    device: torch.device,
) -> StepBatch:
    """The tensors of one step."""
    items = _ordered(plan, find_adapter)
    scheduled = [item.scheduled for item in items]
    bounds = np.cumsum([0, *(each.num_tokens for each in scheduled)])
    indices = np.concatenate([np.arange(each.start, each.end) for each in scheduled])
    offsets = np.array([each.sequence.position_offset for each in scheduled], dtype=np.int64)
    tokens = np.concatenate([each.sequence.token_ids[each.start : each.end] for each in scheduled])
    sampling = [index for index, each in enumerate(scheduled) if each.samples]
    return StepBatch(
        items=items,
        token_ids=_to(tokens.astype(np.int64), device),
        positions=_to(indices + np.repeat(offsets, np.diff(bounds)), device),
        paged=_layers(
            _paged(scheduled, bounds, indices, block_size, device),
            scheduled,
            num_layers,
            block_size,
        ),
        passes=_passes(
            each.ranges(each.scheduled.start, each.scheduled.end, each.first_row) for each in items
        ),
        sample_rows=_to(bounds[1:][sampling] - 1, device),
        sample_passes=_passes(
            items[index].ranges(scheduled[index].end - 1, scheduled[index].end, row)
            for row, index in enumerate(sampling)
        ),
    )


def _ordered(plan: StepPlan, find_adapter: FindAdapter) -> tuple[StepItem, ...]:
    """The base's rows first, then those of each adapter, or of each set of them, together."""
    found = [(_corrections(each, find_adapter), each) for each in plan.scheduled]
    found.sort(key=lambda pair: [(each.slot, each.weight) for each in pair[0]])
    items, row = [], 0
    for corrections, scheduled in found:
        items.append(StepItem(scheduled, row, corrections))
        row += scheduled.num_tokens
    return tuple(items)


def _corrections(
    scheduled: ScheduledSequence, find_adapter: FindAdapter
) -> tuple[_Correction, ...]:
    return tuple(
        _Correction(
            find_adapter(each.adapter_id).slots[each.part], each.weight, each.start, each.end
        )
        for each in scheduled.sequence.adapters.activations
    )


def _passes(items: Iterator[Iterator[RowRange | None]]) -> Passes:
    """The nth range of every item in the nth pass: items share no row."""
    passes: Passes = []
    for ranges in items:
        for index, found in enumerate(each for each in ranges if each is not None):
            if index == len(passes):
                passes.append([])
            passes[index].append(found)
    return passes


def _paged(
    scheduled: Sequence[ScheduledSequence],
    bounds: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int64],
    block_size: int,
    device: torch.device,
) -> PagedBatch:
    """A sequence's keys are those of its prefix, which ends with a block, and then its tokens'."""
    tables = [[*each.sequence.prefix_blocks, *each.sequence.block_table] for each in scheduled]
    # Block j of a table holds the keys j * block_size and on; token i is key before + i.
    before = np.array([len(each.sequence.prefix_blocks) for each in scheduled]) * block_size
    context_lens = before + np.array([each.end for each in scheduled])
    starts = before - np.array([_prefix_length(each) for each in scheduled])
    padded = np.zeros((len(tables), -(-int(context_lens.max()) // block_size)), dtype=np.int32)
    for row, table, length in zip(padded, tables, context_lens.tolist(), strict=True):
        used = -(-length // block_size)
        row[:used] = table[:used]
    sequence_of_row = np.repeat(np.arange(len(tables)), np.diff(bounds))
    keys = indices + before[sequence_of_row]
    blocks = padded[sequence_of_row, keys // block_size].astype(np.int64)
    return PagedBatch(
        cu_seqlens_q=_to(bounds.astype(np.int32), device),
        context_starts=_to(starts.astype(np.int32), device),
        context_lens=_to(context_lens.astype(np.int32), device),
        block_tables=_to(padded, device),
        slot_mapping=_to(blocks * block_size + keys % block_size, device),
    )


def _layers(
    batch: PagedBatch, scheduled: Sequence[ScheduledSequence], num_layers: int, block_size: int
) -> Sequence[PagedBatch]:
    """One batch for all layers, but where a prefix belongs to some of them alone."""
    partial = {
        index: prefix.layers
        for index, each in enumerate(scheduled)
        if (prefix := each.sequence.adapters.prefix) is not None and prefix.layers is not None
    }
    if not partial:
        return [batch] * num_layers
    batches = []
    for layer in range(num_layers):
        starts = batch.context_starts.clone()
        for index, layers in partial.items():
            if layer not in layers:
                starts[index] = len(scheduled[index].sequence.prefix_blocks) * block_size
        batches.append(replace(batch, context_starts=starts))
    return batches


def _prefix_length(scheduled: ScheduledSequence) -> int:
    prefix = scheduled.sequence.adapters.prefix
    return 0 if prefix is None else prefix.length


def _to(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
