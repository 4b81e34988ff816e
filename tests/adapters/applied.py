"""What a lowered adapter does at one place of the base, by the reference operations alone.

No server and no decoder: the tensors of an adapter are laid into a pool of their own, and the ops
of ``kernels`` are called on plain tensors. A test compares the result with the library's module.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.base import Base
from deltamux.adapters.kind import Lowered
from deltamux.adapters.layout import (
    BaseLayout,
    EmbeddingSite,
    Half,
    LayerSite,
    LinearTarget,
    NormSite,
)
from deltamux.adapters.primitives.embedding import EmbeddingAffine, EmbeddingRows
from deltamux.adapters.primitives.layer import Bottleneck, NormOverride, SideAttention
from deltamux.adapters.primitives.linear import (
    Affine,
    Circulant,
    Dense,
    InputTransform,
    Kronecker,
    OutputRows,
    Sparse,
    Spectral,
)
from deltamux.adapters.primitives.lowered import PRIMITIVE_TYPES
from deltamux.adapters.primitives.primitive import ALIGNMENT_BYTES, Primitive
from deltamux.kernels.backend import DeltaOps, reference_backend
from deltamux.kernels.tables import PrimitiveTable, Segments, SiteTargets


@dataclass(frozen=True)
class Applied:
    """A lowered adapter of one part, in adapter slot 0 of a pool of its own.

    Every method takes all rows as one segment of weight ``weight``, leaves its inputs alone and
    returns what the place's output becomes. ``x`` is (rows, in).
    """

    base: Base
    ops: DeltaOps
    tables: dict[type, PrimitiveTable]
    weight: float

    @classmethod
    def of(cls, lowered: Lowered, base: Base, weight: float = 1.0) -> "Applied":
        (part,) = lowered.parts
        tables = _tables(part.primitives, base.layout, base.dtype)
        return cls(base, reference_backend().deltas, tables, weight)

    def linear(self, target: LinearTarget, x: Tensor) -> Tensor:
        """y of one linear module, everything included: x is transformed, y corrected."""
        weight, bias = self.base.linear(target)
        y = torch.nn.functional.linear(self.transformed(target, x), weight, bias)
        return self.corrected(target, y, x)

    def transformed(self, target: LinearTarget, x: Tensor) -> Tensor:
        """What the base multiplies instead of x."""
        targets = SiteTargets(target.index, (0,), (target.out_features,))
        table, segments = self.tables[InputTransform], self._segments(x)
        (inputs,) = self.ops.transform_inputs(x, table, targets, segments)
        return inputs

    def corrected(self, target: LinearTarget, y: Tensor, x: Tensor) -> Tensor:
        """What the base's output y becomes; the corrections see x as it came."""
        y, segments = y.clone(), self._segments(x)
        targets = SiteTargets(target.index, (0,), (target.out_features,))
        for kind, correct in (
            (Affine, self.ops.correct_affine),
            (Dense, self.ops.add_dense),
            (Sparse, self.ops.add_sparse),
            (Spectral, self.ops.add_spectral),
            (Kronecker, self.ops.add_kronecker),
            (Circulant, self.ops.add_circulant),
            (OutputRows, self.ops.replace_outputs),
        ):
            correct(y, x, self.tables[kind], targets, segments)
        return y

    def embedding(self, site: EmbeddingSite, ids: Tensor) -> Tensor:
        """Embedded rows (ids, size)."""
        rows = self.base.embedding(site)[ids].clone()
        segments = self._segments(rows)
        self.ops.replace_rows(rows, ids, self.tables[EmbeddingRows], site.index, segments)
        self.ops.correct_embedding(rows, ids, self.tables[EmbeddingAffine], site.index, segments)
        return rows

    def norm(self, site: NormSite, y: Tensor, x: Tensor, eps: float, centered: bool) -> Tensor:
        """What the base norm's output y for x becomes."""
        y, segments = y.clone(), self._segments(x)
        self.ops.override_norm(y, x, self.tables[NormOverride], site.index, segments, eps, centered)
        return y

    def half(self, layer: LayerSite, half: Half, h: Tensor, r: Tensor) -> Tensor:
        """What the output h of a layer's half becomes, r being the residual stream before it."""
        out = h.clone()
        row = layer.half_index(half)
        self.ops.add_bottleneck(out, h, r, self.tables[Bottleneck], row, self._segments(h))
        return out

    def attention(self, layer: LayerSite, out: Tensor, query: Tensor, scale: float) -> Tensor:
        """What an attention's output becomes; out and query are (rows, heads, head_dim)."""
        out = out.clone()
        kv_heads = self.base.layout.num_kv_heads
        table, segments = self.tables[SideAttention], self._segments(out)
        self.ops.add_side_attention(out, query, table, layer.index, segments, kv_heads, scale)
        return out

    def _segments(self, rows: Tensor) -> Segments:
        return Segments.of([(0, len(rows), 0, self.weight)])


def apply_linear(lowered: Lowered, base: Base, target: LinearTarget, x: Tensor) -> Tensor:
    """y (rows, out) of one linear module of the base with the adapter, for x (rows, in)."""
    return Applied.of(lowered, base).linear(target, x)


def check_order(lowered: Lowered) -> None:
    """Primitives stand in the order of their places, one of each type at each place."""
    for part in lowered.parts:
        for kind in PRIMITIVE_TYPES:
            rows = [each.row for each in part.primitives if type(each) is kind]
            assert rows == sorted(set(rows)), kind.__name__


def _tables(
    primitives: tuple[Primitive, ...], layout: BaseLayout, dtype: torch.dtype
) -> dict[type, PrimitiveTable]:
    """The pool, and in it one table for every type of primitive."""
    tensors = {id(tensor): tensor for each in primitives for tensor in each.tensors}
    starts, size = {}, 0
    for key, tensor in tensors.items():
        assert tensor.dtype in (dtype, torch.int32), tensor.dtype
        assert tensor.is_contiguous()
        starts[key] = size
        size += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    pool = torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN in float32 and in bfloat16
    for key, tensor in tensors.items():
        flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else pool[:0]
        pool[starts[key] : starts[key] + tensor.nbytes] = flat
    numbers, indices = pool.view(dtype), pool.view(torch.int32)
    tables = {}
    for kind in PRIMITIVE_TYPES:
        cells = torch.full((kind.num_rows(layout), 1, kind.num_fields()), -1, dtype=torch.int64)
        for each in primitives:
            if type(each) is kind:
                assert int(cells[each.row, 0, 0]) == -1, f"two {kind.__name__} at {each.path}"
                at = [starts[id(tensor)] // tensor.itemsize for tensor in each.tensors]
                cells[each.row, 0] = torch.tensor(each.cell(at))
        tables[kind] = PrimitiveTable(cells, numbers, indices)
    return tables
