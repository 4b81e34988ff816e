"""Which rows of a step get which corrections, before anything of it is on the device.

A row may have several adapters. The step's rows are laid out in *passes*: in each, no row has more
than one adapter slot, so that a kernel may compute a pass's segments in any order. Almost every
step has one pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from ...kernels.tables import PrimitiveTable, SegmentLayout
from ..primitives.linear import InputTransform
from ..primitives.primitive import Primitive
from .pool import AdapterPool


class RowRange(NamedTuple):
    """Rows ``start .. end`` of a batch that one adapter slot corrects with one weight."""

    start: int
    end: int
    slot: int
    weight: float


@dataclass(frozen=True, slots=True)
class PartLayout:
    """Where one type of primitive acts.

    Attributes:
        table: Where its tensors lie.
        rows: Of each row of the table, whether any adapter of the step has a cell there.
        passes: The rows of the batch, by adapter slot.
    """

    table: PrimitiveTable
    rows: tuple[bool, ...]
    passes: tuple[SegmentLayout, ...]


BatchLayout = Mapping[type[Primitive], PartLayout]
"""Of every type that some adapter of the step has."""


def lay_out(
    pool: AdapterPool, passes: Sequence[Sequence[RowRange]], bucket: int | None = None
) -> BatchLayout:
    """The rows of a batch by what corrects them.

    Args:
        pool: Where the adapters are.
        passes: In each, ranges in the order of their rows, of which none overlap.
        bucket: Rows of a captured step: equal ``AdapterBatch.shape`` then means equal launches, as
            nothing else depends on which adapters these are. Such a step has one pass at most.
    """
    by_type: dict[type[Primitive], list[list[RowRange]]] = {}
    for ranges in passes:
        for kind, selected in _by_type(pool, _joined(ranges)).items():
            by_type.setdefault(kind, []).append(selected)
    transforms = by_type.get(InputTransform)
    if transforms is not None:  # a row has one at most, as they are no sums
        by_type[InputTransform] = [sorted(chain.from_iterable(transforms))]
    return {kind: _lay_out(pool, kind, selected, bucket) for kind, selected in by_type.items()}


class LatestLayout:
    """Lays batches out; most are those of the step before, whose layout it keeps."""

    def __init__(self, pool: AdapterPool) -> None:
        """Nothing is laid out."""
        self._pool = pool
        self._key: tuple[Sequence[Sequence[RowRange]], int | None, int] | None = None
        self._layout: BatchLayout = {}

    def of(self, passes: Sequence[Sequence[RowRange]], bucket: int | None) -> BatchLayout:
        """See ``lay_out``; the passes must not be changed afterwards."""
        key = (passes, bucket, self._pool.generation)
        if key != self._key:
            self._layout = lay_out(self._pool, passes, bucket)
            self._key = key
        return self._layout


def _lay_out(
    pool: AdapterPool,
    kind: type[Primitive],
    selected: Iterable[Sequence[RowRange]],
    bucket: int | None,
) -> PartLayout:
    # On a CPU, to record one more shape of step costs more than bounds that are too wide.
    fine = pool.device.type != "cpu"
    slots = sorted({each.slot for ranges in selected for each in ranges})
    inner = pool.inner_of(kind, slots)
    return PartLayout(
        pool.table(kind),
        _rows(pool, kind, slots, bucket),
        tuple(SegmentLayout.of(ranges, inner, bucket, fine) for ranges in selected),
    )


def _rows(
    pool: AdapterPool, kind: type[Primitive], slots: Sequence[int], bucket: int | None
) -> tuple[bool, ...]:
    """Where the step's adapters have cells.

    A GPU's captured step takes every place for one, to serve other adapters as well: a launch that
    finds nothing costs it little, and a capture much. On a CPU it is the other way round.
    """
    if bucket is None or pool.device.type == "cpu":
        return pool.rows_of(kind, slots)
    return (True,) * len(pool.table(kind).cells)


def _by_type(
    pool: AdapterPool, ranges: Iterable[RowRange]
) -> dict[type[Primitive], list[RowRange]]:
    found: dict[type[Primitive], list[RowRange]] = {}
    for each in ranges:
        for kind in pool.types_in(each.slot):
            found.setdefault(kind, []).append(each)
    return found


def _joined(ranges: Iterable[RowRange]) -> list[RowRange]:
    """Neighbours of one slot and weight as one: the runner orders rows by adapter for this."""
    joined: list[RowRange] = []
    for each in ranges:
        last = joined[-1] if joined else None
        if last is not None and (last.end, last.slot, last.weight) == (
            each.start,
            each.slot,
            each.weight,
        ):
            joined[-1] = RowRange(last.start, each.end, last.slot, last.weight)
        else:
            joined.append(each)
    return joined
