"""The adapters of one step: which rows get which corrections, and the corrections themselves.

A row may have several adapters. The step's rows are laid out in *passes*: in each, no row has more
than one adapter slot, so that a kernel may compute a pass's segments in any order. Almost every
step has one pass.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.backend import DeltaOps
from ...kernels.bottleneck.op import AddBottleneck
from ...kernels.embedding.op import CorrectEmbedding
from ...kernels.input_transform.op import CollectOutputs, SpreadRows, TransformInput
from ...kernels.linear.op import LinearOp
from ...kernels.norm_override.op import OverrideNorm
from ...kernels.side_attention.op import AddSideAttention
from ...kernels.tables import CorrectLinear, PrimitiveTable, Segments, SiteTargets
from ..layout import Half
from ..primitives.embedding import EmbeddingAffine, EmbeddingRows
from ..primitives.layer import Bottleneck, NormOverride, SideAttention
from ..primitives.linear import (
    Affine,
    Circulant,
    Dense,
    InputTransform,
    Kronecker,
    OutputRows,
    Sparse,
    Spectral,
)
from ..primitives.primitive import Primitive
from .pool import AdapterPool

Op = TypeVar("Op")

Place = Callable[[npt.NDArray[Any]], Tensor]
"""Brings an array to the device; it need not be there before kernels are launched."""


NOT_RECORDED = frozenset({InputTransform})
"""What steps with prompts cannot be recorded with: it changes how many rows a product has."""


class RowRange(NamedTuple):
    """Rows ``start .. end`` of a batch that one adapter slot corrects with one weight."""

    start: int
    end: int
    slot: int
    weight: float


@dataclass(frozen=True, slots=True)
class _Present(Generic[Op]):
    """A type of primitive that some adapter of the step has.

    Attributes:
        op: What computes it.
        table: Where its tensors lie.
        rows: Of each row of the table, whether any adapter of the step has a cell there.
        passes: The rows of the batch, by adapter slot.
    """

    op: Op
    table: PrimitiveTable
    rows: tuple[bool, ...]
    passes: tuple[Segments, ...]

    def is_at(self, targets: SiteTargets) -> bool:
        """Whether any adapter of the step has a cell at any of the targets."""
        return any(self.rows[targets.first : targets.first + len(targets.out_starts)])


@dataclass(frozen=True, slots=True)
class _InputTransforms:
    """Linear modules that read a changed input.

    Targets of one GEMM may each want another input. So the batch grows: the first target's input
    takes the place of the rows, and the rows are appended once more for each further target.

    Attributes:
        spread: Lets the batch grow.
        collect: Brings the outputs back.
        present: The transforms, over the rows of the batch.
        rows: (n,) int64, every row that has any.
        appended: Their segments among those n rows.
    """

    spread: SpreadRows
    collect: CollectOutputs
    present: _Present[TransformInput]
    rows: Tensor
    appended: tuple[Segments, ...]

    def through(self, base: LinearOp, x: Tensor, targets: SiteTargets) -> Tensor:
        """The base's output (rows, out), each target's from its own input."""
        copies = len(targets.out_starts) - 1
        wide = self.spread(x, self.rows, copies)
        inputs = torch.split(wide, [len(x), *[len(self.rows)] * copies])
        for position, part in enumerate(inputs):
            for segments in self.appended if position else self.present.passes:
                self.present.op(part, self.present.table, targets.first + position, segments)
        return self.collect(base(wide), self.rows, targets)


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """Corrections for the rows of one forward pass; a pass without adapters has none of these.

    Every field is empty but for what adapters of this very step have.
    """

    _inputs: _InputTransforms | None
    _linear: tuple[_Present[CorrectLinear], ...]
    _embeddings: tuple[_Present[CorrectEmbedding], ...]
    _norms: _Present[OverrideNorm] | None
    _bottlenecks: _Present[AddBottleneck] | None
    _side_attention: _Present[AddSideAttention] | None

    @property
    def shape(self) -> Hashable:
        """What a captured step depends on: its operations, their segments' number and bounds."""
        transforms = None if self._inputs is None else self._inputs.present
        present: tuple[_Present[Any] | None, ...] = (
            transforms,
            *self._linear,
            *self._embeddings,
            self._norms,
            self._bottlenecks,
            self._side_attention,
        )
        return tuple(
            (id(each.table), each.rows, len(segments.start), segments.max_rows, segments.max_inner)
            for each in present
            if each is not None
            for segments in each.passes
        )

    def linear(self, base: LinearOp, x: Tensor, targets: SiteTargets) -> Tensor:
        """The site's output (rows, out) for x (rows, in), every row corrected by its adapters."""
        if self._inputs is not None and self._inputs.present.is_at(targets):
            y = self._inputs.through(base, x, targets)
        else:
            y = base(x)
        for each in self._linear:
            if each.is_at(targets):
                for segments in each.passes:
                    each.op(y, x, each.table, targets, segments)
        return y

    def embedding(self, x: Tensor, ids: Tensor, row: int) -> None:
        """Correct x (rows, hidden), the embedded ``ids`` (rows,), in place."""
        for each in self._embeddings:
            if each.rows[row]:
                for segments in each.passes:
                    each.op(x, ids, each.table, row, segments)

    def norm(self, y: Tensor, x: Tensor, row: int, eps: float, *, centered: bool) -> None:
        """Correct y, the normalised x, in place; see ``kernels/norm_override/op.py``."""
        each = self._norms
        if each is not None and each.rows[row]:
            for segments in each.passes:
                each.op(y, x, each.table, row, segments, eps, centered)

    def half(self, h: Tensor, residual: Tensor, layer: int, half: Half) -> None:
        """Correct h (rows, hidden), what attention or MLP adds to the residual stream, in place."""
        each, row = self._bottlenecks, len(Half) * layer + half
        if each is None or not each.rows[row]:
            return
        # Adapters of one row are a sum: each reads what the base computed.
        source = h if len(each.passes) == 1 else h.clone()
        for segments in each.passes:
            each.op(h, source, residual, each.table, row, segments)

    def attention(
        self, out: Tensor, query: Tensor, layer: int, kv_heads: int, scale: float
    ) -> None:
        """Correct out (rows, heads, head_dim), what the heads attended to, in place."""
        each = self._side_attention
        if each is not None and each.rows[layer]:
            for segments in each.passes:
                each.op(out, query, each.table, layer, segments, kv_heads, scale)


def make_batch(
    pool: AdapterPool,
    ops: DeltaOps,
    passes: Iterable[Sequence[RowRange]],
    place: Place = torch.from_numpy,
    bucket: int | None = None,
) -> AdapterBatch | None:
    """The corrections of a batch, None where there are none.

    Args:
        pool: Where the adapters are.
        ops: The device's operations.
        passes: In each, ranges in the order of their rows, of which none overlap.
        place: Brings an array to the device.
        bucket: Rows of a captured step: equal ``shape`` then means equal launches, as nothing else
            depends on which adapters these are. Such a step has one pass at most.
    """
    by_type: dict[type[Primitive], list[list[RowRange]]] = {}
    for ranges in passes:
        for kind, selected in _by_type(pool, _joined(ranges)).items():
            by_type.setdefault(kind, []).append(selected)
    if not by_type:
        return None

    # On a CPU, to record one more shape of step costs more than bounds that are too wide.
    fine = pool.device.type != "cpu"

    def present(kind: type[Primitive], op: Op) -> _Present[Op] | None:
        selected = by_type.get(kind)
        if selected is None:
            return None
        slots = sorted({each.slot for ranges in selected for each in ranges})
        inner = pool.inner_of(kind, slots)
        table = pool.table(kind)
        return _Present(
            op,
            table,
            _rows(pool, kind, slots, bucket),
            tuple(Segments.of(ranges, inner, place, bucket, fine) for ranges in selected),
        )

    transforms = present(InputTransform, ops.transform_input)
    return AdapterBatch(
        _inputs=None
        if transforms is None
        else _input_transforms(ops, transforms, by_type[InputTransform], place, bucket, fine),
        _linear=_there(present(kind, op) for kind, op in _linear_ops(ops)),
        _embeddings=_there(
            (
                present(EmbeddingRows, ops.replace_rows),
                present(EmbeddingAffine, ops.correct_embedding),
            )
        ),
        _norms=present(NormOverride, ops.override_norm),
        _bottlenecks=present(Bottleneck, ops.add_bottleneck),
        _side_attention=present(SideAttention, ops.add_side_attention),
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


def _linear_ops(ops: DeltaOps) -> tuple[tuple[type[Primitive], CorrectLinear], ...]:
    """In the order in which they act: what scales the base's output first, replaced rows last."""
    return (
        (Affine, ops.correct_affine),
        (Dense, ops.add_dense),
        (Sparse, ops.add_sparse),
        (Spectral, ops.add_spectral),
        (Kronecker, ops.add_kronecker),
        (Circulant, ops.add_circulant),
        (OutputRows, ops.replace_outputs),
    )


def _by_type(
    pool: AdapterPool, ranges: Sequence[RowRange]
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


def _input_transforms(
    ops: DeltaOps,
    present: _Present[TransformInput],
    passes: Sequence[Sequence[RowRange]],
    place: Place,
    bucket: int | None,
    fine: bool,
) -> _InputTransforms:
    first, appended = 0, []
    for ranges in passes:
        moved = []
        for each in ranges:
            end = first + each.end - each.start
            moved.append(RowRange(first, end, each.slot, each.weight))
            first = end
        appended.append(Segments.of(moved, 0, place, bucket, fine))
    if len(passes) == 1:
        rows = present.passes[0].rows
    else:  # nothing that was placed is on the device yet
        ranges_of_all = (np.arange(each.start, each.end) for ranges in passes for each in ranges)
        rows = place(np.concatenate(list(ranges_of_all)))
    return _InputTransforms(ops.spread_rows, ops.collect_outputs, present, rows, tuple(appended))


def _there(found: "Iterable[_Present[Op] | None]") -> "tuple[_Present[Op], ...]":
    return tuple(each for each in found if each is not None)
