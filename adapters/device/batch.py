"""The adapters of one step: the corrections of its rows, which ``batch_layout`` has laid out."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...kernels.backend import DeltaOps
from ...kernels.bottleneck.op import AddBottleneck
from ...kernels.embedding.op import CorrectEmbedding
from ...kernels.input_transform.op import TransformInputs
from ...kernels.linear.op import LinearOp
from ...kernels.norm_override.op import OverrideNorm
from ...kernels.side_attention.op import AddSideAttention
from ...kernels.tables import CorrectLinear, Place, PrimitiveTable, Segments, SiteTargets
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
from .batch_layout import BatchLayout, RowRange, lay_out
from .pool import AdapterPool

Op = TypeVar("Op")


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
class AdapterBatch:
    """Corrections for the rows of one forward pass; a pass without adapters has none of these.

    Every field is empty but for what adapters of this very step have.
    """

    _inputs: _Present[TransformInputs] | None
    _linear: tuple[_Present[CorrectLinear], ...]
    _embeddings: tuple[_Present[CorrectEmbedding], ...]
    _norms: _Present[OverrideNorm] | None
    _bottlenecks: _Present[AddBottleneck] | None
    _side_attention: _Present[AddSideAttention] | None

    @property
    def shape(self) -> Hashable:
        """What a captured step depends on: its operations, their segments' number and bounds."""
        present: tuple[_Present[Any] | None, ...] = (
            self._inputs,
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
        y = self._product(base, x, targets)
        for each in self._linear:
            if each.is_at(targets):
                for segments in each.passes:
                    each.op(y, x, each.table, targets, segments)
        return y

    def _product(self, base: LinearOp, x: Tensor, targets: SiteTargets) -> Tensor:
        each = self._inputs
        if each is None or not each.is_at(targets):
            return base(x)
        (segments,) = each.passes
        inputs = each.op(x, each.table, targets, segments)
        return base.per_target(inputs, segments.rows, targets)

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
    passes: Sequence[Sequence[RowRange]],
    place: Place = torch.from_numpy,
    bucket: int | None = None,
) -> AdapterBatch | None:
    """The corrections of a batch; see ``lay_out`` and ``place_batch``."""
    return place_batch(lay_out(pool, passes, bucket), ops, place)


def place_batch(layout: BatchLayout, ops: DeltaOps, place: Place) -> AdapterBatch | None:
    """The corrections of the rows that were laid out, None where there are none.

    Args:
        layout: The rows.
        ops: The device's operations.
        place: Brings an array to the device.
    """
    if not layout:
        return None

    def present(kind: type[Primitive], op: Op) -> _Present[Op] | None:
        part = layout.get(kind)
        if part is None:
            return None
        passes = tuple(segments.placed(place) for segments in part.passes)
        return _Present(op, part.table, part.rows, passes)

    return AdapterBatch(
        _inputs=present(InputTransform, ops.transform_inputs),
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


def _there(found: "Iterable[_Present[Op] | None]") -> "tuple[_Present[Op], ...]":
    return tuple(each for each in found if each is not None)
