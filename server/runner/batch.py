"""A step's plan as the index tensors that the model and the sampler read."""

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...adapters.device.batch_layout import RowRange
from ...adapters.device.pool import Placement
from ...kernels.paged_attention.op import PagedBatch
from ...kernels.tables import Place, lengthened
from ..scheduler.plan import ScheduledSequence, StepPlan
from ..scheduler.sequence import Prefix

FindAdapter = Callable[[int], Placement]
"""Where the adapter of an id is on the device."""

_Ints = npt.NDArray[np.int64]


# Plain tuples: a step makes one for every sequence, and a named one takes three times as long.
Correction = tuple[int, float, int, int]
"""Adapter slot, weight, start, end: the positions ``start .. end`` of a sequence that the part in
one adapter slot corrects."""

RowSpan = tuple[Sequence[Correction], int, int, int]
"""Corrections, start, end, first_row: the rows from ``first_row`` on hold the positions
``start .. end`` of a sequence with these corrections."""

Passes = list[list[RowRange]]
"""Row ranges of adapters; within one pass none overlap."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """What steps are padded to, so that they can be captured; ascending numbers.

    Attributes:
        decode: Rows of a step of one token of every sequence, all of which choose.
        prompts: Rows of other steps.
    """

    decode: Sequence[int] = ()
    prompts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Padding:
    """What one step is padded to.

    Attributes:
        rows: In all.
        sequences: In all.
        decodes: Whether every row is a token of a sequence that chooses, or is padding.
    """

    rows: int
    sequences: int
    decodes: bool


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's rows, ordered so that the rows of each adapter lie together.

    Attributes:
        scheduled: What the plan says of each sequence, in the order of their rows.
        corrections: What its adapters correct, of each.
        first_rows: The first row of each.
        token_ids: (rows,) int64.
        positions: (rows,) int64.
        paged: Per layer, where rows lie in the KV cache.
        passes: The rows' adapters.
        sample_rows: (n,) int64, the last row of each that samples; none where all do.
        num_rows: Those that are no padding.
        padding: What the step is padded to, if it is one that is captured.
    """

    scheduled: Sequence[ScheduledSequence]
    corrections: Sequence[Sequence[Correction]]
    first_rows: Sequence[int]
    token_ids: Tensor
    positions: Tensor
    paged: Sequence[PagedBatch]
    passes: Passes
    sample_rows: Tensor
    num_rows: int
    padding: Padding | None

    @property
    def bucket(self) -> int | None:
        """Rows that the step is padded to."""
        return None if self.padding is None else self.padding.rows

    @property
    def decodes(self) -> bool:
        """Whether it is padded, and all of its rows choose."""
        return self.padding is not None and self.padding.decodes

    @property
    def shape(self) -> Hashable:
        """What a captured step depends on, its adapters aside."""
        return self.padding, self.paged[0].block_tables.shape[1]


_NO_BUCKETS = Buckets()


def build_batch(
    plan: StepPlan,
    find_adapter: FindAdapter,
    num_layers: int,
    block_size: int,
    place: Place,
    buckets: Buckets = _NO_BUCKETS,
) -> StepBatch:
    """The tensors of one step.

    Args:
        plan: The step.
        find_adapter: Where adapters are on the device.
        num_layers: Of the base.
        block_size: Tokens of a KV block.
        place: Brings an array to the device.
        buckets: What it may be padded to. A padding row has no context, its slot is -1, and it lies
            behind the others. It is a sequence of its own in decode steps, and of none in others.
    """
    corrections, scheduled = _ordered(plan, find_adapter)
    starts = [each.start for each in scheduled]
    ends = [each.end for each in scheduled]
    rows = _Rows.of(starts, ends)
    first_rows = rows.bounds.tolist()[:-1]
    prefixes = _Prefixes.of(scheduled, block_size)
    tokens = chain.from_iterable(
        each.sequence.token_ids[start:end]
        for each, start, end in zip(scheduled, starts, ends, strict=True)
    )
    sampling = [index for index, each in enumerate(scheduled) if each.samples]
    passes = passes_of(zip(corrections, starts, ends, first_rows, strict=True))
    padding = _padding(scheduled, prefixes, passes, len(rows.indices), buckets)
    laid_out = len(rows.indices) if padding is None else padding.rows
    token_ids = np.fromiter(tokens, np.int64, len(rows.indices))
    positions = rows.indices + prefixes.offsets[rows.sequence]
    return StepBatch(
        scheduled=scheduled,
        corrections=corrections,
        first_rows=first_rows,
        token_ids=place(lengthened(token_ids, laid_out)),
        positions=place(lengthened(positions, laid_out)),
        paged=_paged(scheduled, prefixes, rows, num_layers, block_size, place, padding),
        passes=passes,
        sample_rows=_sample_rows(rows.bounds[1:][sampling] - 1, place, padding),
        num_rows=len(rows.indices),
        padding=padding,
    )


def _padding(
    scheduled: Sequence[ScheduledSequence],
    prefixes: "_Prefixes",
    passes: Passes,
    num_rows: int,
    buckets: Buckets,
) -> Padding | None:
    """The least that holds the step, if it is one that is captured.

    Not captured are steps in which a row has several adapters, or a prefix is of some layers only.
    """
    if len(passes) > 1 or not prefixes.in_all_layers:
        return None
    if all(each.num_tokens == 1 and each.samples for each in scheduled):
        decode = _least(len(scheduled), buckets.decode)
        return None if decode is None else Padding(decode, decode, decodes=True)
    prompt = _least(num_rows, buckets.prompts)
    sequences = _least(len(scheduled), buckets.decode[-1:])
    if prompt is None or sequences is None:
        return None
    return Padding(prompt, sequences, decodes=False)


def _least(number: int, buckets: Sequence[int]) -> int | None:
    return next((bucket for bucket in buckets if bucket >= number), None)


def _sample_rows(sampling: _Ints, place: Place, padding: Padding | None) -> Tensor:
    """Of a padded step, what is placed for it must not depend on how many they are."""
    if padding is None:
        return place(sampling)
    if padding.decodes:
        return place(sampling[:0])
    return place(lengthened(sampling, padding.sequences))[: len(sampling)]


def passes_of(spans: Iterable[RowSpan]) -> Passes:
    """The nth correction of every span in the nth pass: spans share no row."""
    passes: Passes = []
    for corrections, start, end, first_row in spans:
        index = 0
        for slot, weight, low, high in corrections:
            low, high = low if low > start else start, high if high < end else end
            if low < high:
                if index == len(passes):
                    passes.append([])
                shift = first_row - start
                passes[index].append(RowRange(low + shift, high + shift, slot, weight))
                index += 1
    return passes


class _Rows(NamedTuple):
    """The rows of the scheduled sequences, one behind the other.

    Attributes:
        ends: (sequences,), tokens of each that are computed afterwards.
        bounds: (sequences + 1,), the first row of each and the number of rows.
        sequence: (rows,), which sequence a row is of.
        indices: (rows,), which of its tokens the row holds.
    """

    ends: _Ints
    bounds: _Ints
    sequence: _Ints
    indices: _Ints

    @classmethod
    def of(cls, starts: Sequence[int], ends: Sequence[int]) -> "_Rows":
        first, last = np.array(starts), np.array(ends)
        bounds = np.zeros(len(starts) + 1, dtype=np.int64)
        np.cumsum(last - first, out=bounds[1:])
        sequence = np.repeat(np.arange(len(starts)), last - first)
        indices = np.arange(bounds[-1]) + (first - bounds[:-1])[sequence]
        return cls(last, bounds, sequence, indices)


class _Prefixes(NamedTuple):
    """What stands before the scheduled sequences; few have a prefix.

    Attributes:
        by_sequence: The prefix of those that have one.
        offsets: (sequences,), added to the position of each token.
        starts: (sequences,), the first key: those before it in the prefix's first block are empty.
        before: (sequences,), the key that the sequence's first token is.
    """

    by_sequence: Mapping[int, Prefix]
    offsets: _Ints
    starts: _Ints
    before: _Ints

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledSequence], block_size: int) -> "_Prefixes":
        by_sequence = {
            index: prefix
            for index, each in enumerate(scheduled)
            if (prefix := each.sequence.adapters.prefix) is not None
        }
        offsets, starts, before = np.zeros((3, len(scheduled)), dtype=np.int64)
        for index, prefix in by_sequence.items():
            offsets[index] = prefix.position_offset
            before[index] = len(scheduled[index].sequence.prefix_blocks) * block_size
            starts[index] = before[index] - prefix.length
        return cls(by_sequence, offsets, starts, before)

    @property
    def in_all_layers(self) -> bool:
        """Whether every layer attends to all of them."""
        return all(prefix.layers is None for prefix in self.by_sequence.values())


def _ordered(
    plan: StepPlan, find_adapter: FindAdapter
) -> tuple[Sequence[Sequence[Correction]], Sequence[ScheduledSequence]]:
    """The base's rows first, then those of each adapter, or of each set of them, together."""
    found = [(_corrections(each, find_adapter), each) for each in plan.scheduled]
    found.sort(key=itemgetter(0))
    corrections, scheduled = zip(*found, strict=True)
    return corrections, scheduled


def _corrections(scheduled: ScheduledSequence, find_adapter: FindAdapter) -> Sequence[Correction]:
    return [
        (
            find_adapter(each.adapter_id).slots[each.part],
            each.weight,
            each.start,
            sys.maxsize if each.end is None else each.end,
        )
        for each in scheduled.sequence.adapters.activations
    ]


def _paged(
    scheduled: Sequence[ScheduledSequence],
    prefixes: _Prefixes,
    rows: _Rows,
    num_layers: int,
    block_size: int,
    place: Place,
    padding: Padding | None,
) -> Sequence[PagedBatch]:
    """A sequence's keys are those of its prefix, which ends with a block, and then its tokens'."""
    # Block j of a table holds the keys j * block_size and on.
    tables = [each.sequence.block_table for each in scheduled]
    for index in prefixes.by_sequence:
        tables[index] = [*scheduled[index].sequence.prefix_blocks, *tables[index]]
    context_lens = prefixes.before + rows.ends
    padded = _padded(tables, -(-context_lens // block_size))
    keys = rows.indices + prefixes.before[rows.sequence]
    blocks = padded[rows.sequence, keys // block_size].astype(np.int64)
    slots = blocks * block_size + keys % block_size
    sequences, laid_out, each = len(scheduled), len(slots), 0
    if padding is not None:
        sequences, laid_out, each = padding.sequences, padding.rows, int(padding.decodes)
        padded = _widened(padded, sequences)
    missing = sequences - len(scheduled)
    bounds = np.append(rows.bounds, rows.bounds[-1] + each * np.arange(1, missing + 1))
    batch = PagedBatch(
        cu_seqlens_q=place(bounds.astype(np.int32)),
        context_starts=place(lengthened(prefixes.starts, sequences).astype(np.int32)),
        context_lens=place(lengthened(context_lens, sequences).astype(np.int32)),
        block_tables=place(padded),
        slot_mapping=place(lengthened(slots, laid_out, fill=-1)),
        max_seqlen_q=int(np.diff(rows.bounds).max()),
        max_context_len=padded.shape[1] * block_size,
    )
    if prefixes.in_all_layers:
        return [batch] * num_layers
    return [_in_layer(layer, batch, prefixes, place) for layer in range(num_layers)]


def _padded(tables: Sequence[Sequence[int]], used: _Ints) -> npt.NDArray[np.int32]:
    """The first ``used`` blocks of each table as (sequences, most that any uses), zeros behind."""
    padded = np.zeros((len(tables), used.max()), dtype=np.int32)
    there = np.arange(padded.shape[1]) < used[:, None]
    blocks = (table[:number] for table, number in zip(tables, used.tolist(), strict=True))
    padded[there] = np.fromiter(chain.from_iterable(blocks), np.int32, used.sum())
    return padded


def _widened(tables: npt.NDArray[np.int32], sequences: int) -> npt.NDArray[np.int32]:
    """A row for each of so many sequences, and as many columns as the next power of two."""
    columns = 1 << (tables.shape[1] - 1).bit_length()
    wide = np.zeros((sequences, columns), dtype=np.int32)
    wide[: len(tables), : tables.shape[1]] = tables
    return wide


def _in_layer(layer: int, batch: PagedBatch, prefixes: _Prefixes, place: Place) -> PagedBatch:
    """The batch where some prefixes are for other layers alone."""
    starts = prefixes.starts.astype(np.int32)
    for index, prefix in prefixes.by_sequence.items():
        if prefix.layers is not None and layer not in prefix.layers:
            starts[index] = prefixes.before[index]
    return replace(batch, context_starts=place(starts))
