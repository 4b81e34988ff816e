"""A step's plan as the index tensors that the model and the sampler read."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...adapters.device.batch_layout import RowRange
from ...adapters.device.pool import Placement
from ...kernels.paged_attention.op import PagedBatch
from ...kernels.tables import Place
from ..scheduler.plan import ScheduledSequence, StepPlan
from ..scheduler.sequence import Prefix

FindAdapter = Callable[[int], Placement]
"""Where the adapter of an id is on the device."""

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
        places: Where each stands in the plan.
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
    places: Sequence[int]
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
    corrections, places, scheduled = _ordered(plan, find_adapter)
    bounds = list(accumulate((each.num_tokens for each in scheduled), initial=0))
    prefixes = _Prefixes.of(scheduled, block_size)
    passes = passes_of(
        (each, item.start, item.end, first_row)
        for each, item, first_row in zip(corrections, scheduled, bounds, strict=False)
    )
    sampling = [index for index, each in enumerate(scheduled) if each.samples]
    padding = _padding(bounds, len(sampling), passes, prefixes, buckets)
    laid_out = bounds[-1] if padding is None else padding.rows
    missing = laid_out - bounds[-1]
    tokens = chain.from_iterable(
        each.sequence.token_ids[each.start : each.end] for each in scheduled
    )
    positions = chain.from_iterable(
        range(each.start + offset, each.end + offset)
        for each, offset in zip(scheduled, prefixes.offsets, strict=True)
    )
    return StepBatch(
        scheduled=scheduled,
        places=places,
        corrections=corrections,
        first_rows=bounds[:-1],
        token_ids=place(_array(tokens, laid_out, missing)),
        positions=place(_array(positions, laid_out, missing)),
        paged=_paged(scheduled, prefixes, bounds, num_layers, block_size, place, padding),
        passes=passes,
        sample_rows=_sample_rows([bounds[index + 1] - 1 for index in sampling], place, padding),
        num_rows=bounds[-1],
        padding=padding,
    )


def _array(
    numbers: Iterable[int], length: int, behind: int = 0, fill: int = 0, dtype: Any = np.int64
) -> npt.NDArray[Any]:
    """The numbers and ``behind`` times ``fill``, ``length`` in all.

    Always by one function of numpy: in a step, the first call of another would cost as much as ten.
    """
    return np.fromiter(chain(numbers, repeat(fill, behind)), dtype, length)


def _padding(
    bounds: Sequence[int],
    num_sampling: int,
    passes: Passes,
    prefixes: "_Prefixes",
    buckets: Buckets,
) -> Padding | None:
    """The least that holds the step, if it is one that is captured.

    Not captured are steps in which a row has several adapters, or a prefix is of some layers only.
    """
    if len(passes) > 1 or not prefixes.in_all_layers:
        return None
    num_sequences, num_rows = len(bounds) - 1, bounds[-1]
    if num_sampling == num_rows:  # each of which is then a sequence
        decode = _least(num_sequences, buckets.decode)
        return None if decode is None else Padding(decode, decode, decodes=True)
    prompt = _least(num_rows, buckets.prompts)
    sequences = _least(num_sequences, buckets.decode[-1:])
    if prompt is None or sequences is None:
        return None
    return Padding(prompt, sequences, decodes=False)


def _least(number: int, buckets: Sequence[int]) -> int | None:
    index = bisect_left(buckets, number)
    return buckets[index] if index < len(buckets) else None


def _sample_rows(rows: Sequence[int], place: Place, padding: Padding | None) -> Tensor:
    """Of a padded step, what is placed for it must not depend on how many they are."""
    if padding is None:
        return place(_array(rows, len(rows)))
    if padding.decodes:
        return place(_array((), 0))
    missing = padding.sequences - len(rows)
    return place(_array(rows, padding.sequences, missing))[: len(rows)]


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


class _Prefixes(NamedTuple):
    """What stands before the scheduled sequences; few have a prefix.

    Attributes:
        by_sequence: The prefix of those that have one.
        offsets: Of each sequence, what is added to the position of each token.
        starts: The first key of each: those before it in the prefix's first block are empty.
        before: The key that the first token of each is.
    """

    by_sequence: Mapping[int, Prefix]
    offsets: Sequence[int]
    starts: Sequence[int]
    before: Sequence[int]

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledSequence], block_size: int) -> "_Prefixes":
        by_sequence = {
            index: prefix
            for index, each in enumerate(scheduled)
            if (prefix := each.sequence.adapters.prefix) is not None
        }
        offsets, starts, before = ([0] * len(scheduled) for _ in range(3))
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
) -> tuple[Sequence[Sequence[Correction]], Sequence[int], Sequence[ScheduledSequence]]:
    """The base's rows first, then those of each adapter, or of each set of them, together."""
    found = [_corrections(each, find_adapter) for each in plan.scheduled]
    places = sorted(range(len(found)), key=found.__getitem__)
    scheduled = [plan.scheduled[place] for place in places]
    return [found[place] for place in places], places, scheduled


def _corrections(scheduled: ScheduledSequence, find_adapter: FindAdapter) -> list[Correction]:
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
    bounds: Sequence[int],
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
    spans = [
        (before + each.start, before + each.end)
        for before, each in zip(prefixes.before, scheduled, strict=True)
    ]
    used = [-(-end // block_size) for _, end in spans]
    slots = chain.from_iterable(
        _slots(table, first, end, block_size)
        for table, (first, end) in zip(tables, spans, strict=True)
    )
    sequences, laid_out, rows_each, columns = len(scheduled), bounds[-1], 0, max(used)
    if padding is not None:
        sequences, laid_out, rows_each = padding.sequences, padding.rows, int(padding.decodes)
        columns = 1 << (columns - 1).bit_length()  # few shapes
    missing = sequences - len(scheduled)
    behind = [bounds[-1] + rows_each * number for number in range(1, missing + 1)]
    ends = (end for _, end in spans)
    batch = PagedBatch(
        cu_seqlens_q=place(_array([*bounds, *behind], sequences + 1, dtype=np.int32)),
        context_starts=place(_array(prefixes.starts, sequences, missing, dtype=np.int32)),
        context_lens=place(_array(ends, sequences, missing, dtype=np.int32)),
        block_tables=place(_padded(tables, used, sequences, columns)),
        slot_mapping=place(_array(slots, laid_out, laid_out - bounds[-1], fill=-1)),
        max_seqlen_q=max(each.num_tokens for each in scheduled),
        max_context_len=columns * block_size,
    )
    if prefixes.in_all_layers:
        return [batch] * num_layers
    return [_in_layer(layer, batch, prefixes, place) for layer in range(num_layers)]


def _slots(table: Sequence[int], first: int, end: int, block_size: int) -> Iterator[int]:
    """Where the keys ``first .. end`` of a sequence lie, block by block."""
    for index in range(first // block_size, -(-end // block_size)):
        shift = (table[index] - index) * block_size
        low, high = index * block_size, (index + 1) * block_size
        yield from range(shift + max(first, low), shift + min(end, high))


def _padded(
    tables: Sequence[Sequence[int]], used: Sequence[int], sequences: int, columns: int
) -> npt.NDArray[np.int32]:
    """The first ``used`` blocks of each table as (sequences, columns), zeros behind."""
    blocks = chain.from_iterable(
        chain(table[:number], repeat(0, columns - number))
        for table, number in zip(tables, used, strict=True)
    )
    behind = (sequences - len(tables)) * columns
    flat = _array(blocks, sequences * columns, behind, dtype=np.int32)
    return flat.reshape(sequences, columns)


def _in_layer(layer: int, batch: PagedBatch, prefixes: _Prefixes, place: Place) -> PagedBatch:
    """The batch where some prefixes are for other layers alone."""
    starts = list(prefixes.starts)
    for index, prefix in prefixes.by_sequence.items():
        if prefix.layers is not None and layer not in prefix.layers:
            starts[index] = prefixes.before[index]
    placed = place(_array(starts, len(starts), dtype=np.int32))
    return replace(batch, context_starts=placed)
