"""What adapters lower to. The engine knows these; it does not know kinds.

Each primitive is a correction at one place of the base, computed beside the base and never merged
into it. Its device math lives once, in the folder of ``kernels/`` that ``Cell`` comes from: the
tensors of a primitive lie in the device pool, and its cell tells the kernel where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ..kernels.affine import op as affine
from ..kernels.bottleneck import op as bottleneck
from ..kernels.bottleneck.op import Activation, Source
from ..kernels.circulant import op as circulant
from ..kernels.dense import op as dense
from ..kernels.embedding import op as embedding
from ..kernels.input_transform import op as input_transform
from ..kernels.kronecker import op as kronecker
from ..kernels.norm_override import op as norm_override
from ..kernels.output_rows import op as output_rows
from ..kernels.side_attention import op as side_attention
from ..kernels.sparse import op as sparse
from ..kernels.spectral import op as spectral
from .layout import BaseLayout, EmbeddingSite, Half, LayerSite, LinearTarget, NormSite
from .scope import Scope

ALIGNMENT_BYTES = 64
"""Every tensor begins at a multiple of this on the device."""


class Primitive(Protocol):
    """A correction at one place of the base."""

    @classmethod
    def num_fields(cls) -> int:
        """Fields of a cell of its table."""
        ...

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """Rows of its table: the places of the base where it can be."""
        ...

    @property
    def row(self) -> int:
        """The table's row of its place."""
        ...

    @property
    def path(self) -> str:
        """Module path of its place."""
        ...

    @property
    def is_sum(self) -> bool:
        """Whether it only adds, so that a request may weight it and add other adapters' sums."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it stores: numbers in the base's dtype, indices as int32.

        One tensor object that several primitives store lies on the device once.
        """
        ...

    def cell(self, offsets: Sequence[int]) -> tuple[int, ...]:
        """The fields of its cell, given where each of ``tensors`` begins, in elements."""
        ...


@dataclass(frozen=True)
class _OnTarget:
    """At a linear target.

    Attributes:
        target: The linear module.
    """

    target: LinearTarget

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """One row a target."""
        return layout.num_targets

    @property
    def row(self) -> int:
        """The target's index."""
        return self.target.index

    @property
    def path(self) -> str:
        """The target's path."""
        return self.target.path

    @property
    def is_sum(self) -> bool:
        """Most corrections of a linear module are."""
        return True


@dataclass(frozen=True)
class Affine(_OnTarget):
    """y = g * y + (x Aᵀ) B + c on one target; see ``kernels/affine/op.py``.

    Attributes:
        a: (rank, in_features), None without a low-rank part.
        b: (rank, out_features): the checkpoint's B transposed, so that a rank row is contiguous in
            both factors, and multiplied by the adapter's scale.
        bias: c (out_features,).
        scale: g (out_features,).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(affine.Cell._fields)

    @property
    def rank(self) -> int:
        """Rows of A and of B."""
        return 0 if self.a is None else self.a.shape[0]

    @property
    def is_sum(self) -> bool:
        """Unless it scales the base's output."""
        return self.scale is None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A, B, c and g, as far as they are there."""
        return _present(self.a, self.b, self.bias, self.scale)

    def cell(self, offsets: Sequence[int]) -> affine.Cell:
        """See ``Primitive``."""
        a, b, bias, scale = _spread(offsets, self.a, self.b, self.bias, self.scale)
        return affine.Cell(self.rank, a, b, bias, scale)


@dataclass(frozen=True)
class Dense(_OnTarget):
    """y += x Dᵀ on one target, D (out_features, in_features)."""

    weight: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(dense.Cell._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """D."""
        return (self.weight,)

    def cell(self, offsets: Sequence[int]) -> dense.Cell:
        """See ``Primitive``."""
        return dense.Cell(*offsets)


@dataclass(frozen=True)
class Sparse(_OnTarget):
    """y += x Sᵀ on one target, S (out_features, in_features) by rows (CSR).

    Attributes:
        row_starts: (out_features + 1,) int32.
        columns: (entries,) int32.
        values: (entries,).
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(sparse.Cell._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Row starts, columns, values."""
        return (self.row_starts, self.columns, self.values)

    def cell(self, offsets: Sequence[int]) -> sparse.Cell:
        """See ``Primitive``."""
        return sparse.Cell(self.values.numel(), *offsets)


@dataclass(frozen=True)
class Spectral(Sparse):
    """y += Re(ifft2(S)) x on one target: S as in ``Sparse``, but of frequencies."""

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(spectral.Cell._fields)


@dataclass(frozen=True)
class Kronecker(_OnTarget):
    """y += kron(L, R) x on one target; see ``kernels/kronecker/op.py``.

    Attributes:
        left: L (l, m).
        right: R (k, n), or D (rank, n) where R = U D.
        up: U (k, rank), or None.
    """

    left: Tensor
    right: Tensor
    up: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(kronecker.Cell._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """L, then R or D and U."""
        return _present(self.left, self.right, self.up)

    def cell(self, offsets: Sequence[int]) -> kronecker.Cell:
        """See ``Primitive``."""
        rows, columns = self.left.shape
        rank = 0 if self.up is None else self.right.shape[0]
        return kronecker.Cell(
            rows, columns, rank, *_spread(offsets, self.left, self.right, self.up)
        )


@dataclass(frozen=True)
class Circulant(_OnTarget):
    """Block-circulant difference on one target; see ``kernels/circulant/op.py``.

    Attributes:
        kernel: K (out_features / b, in_features / b, b).
    """

    kernel: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(circulant.Cell._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """K."""
        return (self.kernel,)

    def cell(self, offsets: Sequence[int]) -> circulant.Cell:
        """See ``Primitive``."""
        return circulant.Cell(self.kernel.shape[2], *offsets)


@dataclass(frozen=True)
class OutputRows(_OnTarget):
    """y[index_k] = x . W_k on one target, for heads with trained tokens.

    Attributes:
        indices: (count,) int32, ascending.
        weight: W (count, in_features).
    """

    indices: Tensor
    weight: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(output_rows.Cell._fields)

    @property
    def is_sum(self) -> bool:
        """It replaces."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Indices and W."""
        return (self.indices, self.weight)

    def cell(self, offsets: Sequence[int]) -> output_rows.Cell:
        """See ``Primitive``."""
        return output_rows.Cell(self.indices.numel(), *offsets)


@dataclass(frozen=True)
class InputTransform(_OnTarget):
    """The target reads s * x, rotated; see ``kernels/input_transform/op.py``. A still sees x.

    Attributes:
        scale: s (in_features,).
        rotations: R (stages, blocks or 1, b, b).
        permutations: p (stages, in_features) int32.
    """

    scale: Tensor | None = None
    rotations: Tensor | None = None
    permutations: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(input_transform.Cell._fields)

    @property
    def is_sum(self) -> bool:
        """It changes what the base multiplies."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """R, p and s, as far as they are there."""
        return _present(self.rotations, self.permutations, self.scale)

    def cell(self, offsets: Sequence[int]) -> input_transform.Cell:
        """See ``Primitive``."""
        stages, blocks, block = (0, 0, 0) if self.rotations is None else self.rotations.shape[:3]
        at = _spread(offsets, self.rotations, self.permutations, self.scale)
        return input_transform.Cell(stages, blocks, block, *at)


@dataclass(frozen=True)
class _OnEmbedding:
    """At an embedding.

    Attributes:
        site: The embedding.
    """

    site: EmbeddingSite

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """One row an embedding."""
        return len(layout.embeddings)

    @property
    def row(self) -> int:
        """The embedding's index."""
        return self.site.index

    @property
    def path(self) -> str:
        """The embedding's path."""
        return self.site.path


@dataclass(frozen=True)
class EmbeddingRows(_OnEmbedding):
    """Some or all rows of an embedding are replaced.

    Attributes:
        rows: (count, size).
        ids: (count,) int32, ascending; None where every row is given.
    """

    rows: Tensor
    ids: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(embedding.RowsCell._fields)

    @property
    def is_sum(self) -> bool:
        """It replaces."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Rows, and ids where there are."""
        return _present(self.rows, self.ids)

    def cell(self, offsets: Sequence[int]) -> embedding.RowsCell:
        """See ``Primitive``."""
        return embedding.RowsCell(self.rows.shape[0], *_spread(offsets, self.rows, self.ids))


@dataclass(frozen=True)
class EmbeddingAffine(_OnEmbedding):
    """x = g * x + A[token] B at an embedding.

    Attributes:
        a: A (num_embeddings, rank): the checkpoint's A transposed.
        b: B (rank, size), multiplied by the adapter's scale.
        scale: g (size,).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(embedding.AffineCell._fields)

    @property
    def is_sum(self) -> bool:
        """Unless it scales the base's rows."""
        return self.scale is None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A, B and g, as far as they are there."""
        return _present(self.a, self.b, self.scale)

    def cell(self, offsets: Sequence[int]) -> embedding.AffineCell:
        """See ``Primitive``."""
        rank = 0 if self.a is None else self.a.shape[1]
        return embedding.AffineCell(rank, *_spread(offsets, self.a, self.b, self.scale))


@dataclass(frozen=True)
class NormOverride:
    """A norm with another weight, and bias if it has one.

    Attributes:
        site: The norm.
        weight: (size,).
        bias: (size,); also possible where the base's norm has none.
    """

    site: NormSite
    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(norm_override.Cell._fields)

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """One row a norm."""
        return len(layout.norms)

    @property
    def row(self) -> int:
        """The norm's index."""
        return self.site.index

    @property
    def path(self) -> str:
        """The norm's path."""
        return self.site.path

    @property
    def is_sum(self) -> bool:
        """It replaces."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight, and bias where there is one."""
        return _present(self.weight, self.bias)

    def cell(self, offsets: Sequence[int]) -> norm_override.Cell:
        """See ``Primitive``."""
        return norm_override.Cell(*offsets)


@dataclass(frozen=True)
class Bottleneck:
    """out += f(z Dᵀ + d) U + u beside one half of a layer; see ``kernels/bottleneck/op.py``.

    Attributes:
        layer: The layer.
        half: Behind its attention or its MLP.
        source: What it reads: the half's output, the residual stream before it, or their sum,
            which behind the MLP is the layer's output.
        activation: f.
        down: D (width, hidden).
        up: U (width, hidden): the checkpoint's up projection transposed, every scale folded in.
        down_bias: d (width,).
        up_bias: u (hidden,).
    """

    layer: LayerSite
    half: Half
    source: Source
    activation: Activation
    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(bottleneck.Cell._fields)

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """Two rows a layer."""
        return len(Half) * layout.num_layers

    @property
    def row(self) -> int:
        """The half's index."""
        return self.layer.half_index(self.half)

    @property
    def path(self) -> str:
        """The layer's path."""
        return self.layer.path

    @property
    def is_sum(self) -> bool:
        """It adds to the half's output."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """D, U, d and u, as far as they are there."""
        return _present(self.down, self.up, self.down_bias, self.up_bias)

    def cell(self, offsets: Sequence[int]) -> bottleneck.Cell:
        """See ``Primitive``."""
        at = _spread(offsets, self.down, self.up, self.down_bias, self.up_bias)
        return bottleneck.Cell(self.down.shape[0], self.activation, self.source, *at)


@dataclass(frozen=True)
class SideAttention:
    """Attention to keys of the adapter's own in one layer; see ``kernels/side_attention/op.py``.

    Attributes:
        layer: The layer.
        keys: (kv_heads, length, head_dim).
        values: (kv_heads, length, head_dim), multiplied by the gate.
    """

    layer: LayerSite
    keys: Tensor
    values: Tensor

    @classmethod
    def num_fields(cls) -> int:
        """See ``Primitive``."""
        return len(side_attention.Cell._fields)

    @classmethod
    def num_rows(cls, layout: BaseLayout) -> int:
        """One row a layer."""
        return layout.num_layers

    @property
    def row(self) -> int:
        """The layer's index."""
        return self.layer.index

    @property
    def path(self) -> str:
        """The attention's path."""
        return self.layer.attention_path

    @property
    def is_sum(self) -> bool:
        """It adds to the attention's output."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return (self.keys, self.values)

    def cell(self, offsets: Sequence[int]) -> side_attention.Cell:
        """See ``Primitive``."""
        return side_attention.Cell(self.keys.shape[1], *offsets)


PRIMITIVE_TYPES: tuple[type[Primitive], ...] = (
    Affine,
    Dense,
    Sparse,
    Spectral,
    Kronecker,
    Circulant,
    OutputRows,
    InputTransform,
    EmbeddingRows,
    EmbeddingAffine,
    NormOverride,
    Bottleneck,
    SideAttention,
)
"""What has a table on the device."""


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values before a request's own, in ordinary cache blocks.

    Attributes:
        keys: (layers, kv_heads, length, head_dim), as they stand in the cache: rotated or not.
        values: Like the keys.
        position_offset: Added to the position of every token of the request: the length in PEFT,
            0 in AdapterHub.
        embedded: Whether the base computed it from a soft prompt, so that it belongs to the bare
            base and goes with no other adapter.
        layers: Those that attend to it, ascending; None for all of them. What it holds for the
            others is not read.
    """

    keys: Tensor
    values: Tensor
    position_offset: int
    embedded: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Keys of a layer."""
        return self.keys.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return (self.keys, self.values)


@dataclass(frozen=True)
class Part:
    """Primitives that apply to the same positions; each part has an adapter slot of its own.

    Attributes:
        scope: The positions.
        primitives: At most one of each type at each place.
    """

    scope: Scope
    primitives: tuple[Primitive, ...]


@dataclass(frozen=True)
class LoweredAdapter:
    """An adapter in host memory, ready to be copied to the device.

    Attributes:
        digest: SHA-256 (hex) over the adapter's files: the version's identity and its KV's salt.
        kind: ``lora``, ...
        library: ``peft``, ...
        parts: Corrections by scope.
        prefix: None without one.
    """

    digest: str
    kind: str
    library: str
    parts: tuple[Part, ...]
    prefix: KVPrefix | None = None

    @cached_property
    def primitives(self) -> tuple[Primitive, ...]:
        """Those of all parts."""
        return tuple(primitive for part in self.parts for primitive in part.primitives)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """What its primitives store on the device, each object once, in order of appearance."""
        found = {id(tensor): tensor for each in self.primitives for tensor in each.tensors}
        return tuple(found.values())

    @cached_property
    def rank(self) -> int:
        """Largest rank of any low-rank primitive, 0 without one."""
        return max((each.rank for each in self.primitives if isinstance(each, Affine)), default=0)

    @cached_property
    def num_elements(self) -> int:
        """Numbers stored, the same on host and device."""
        return sum(tensor.numel() for tensor in self._stored)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes stored on the host."""
        return sum(tensor.nbytes for tensor in self._stored)

    @cached_property
    def num_device_bytes(self) -> int:
        """Bytes it takes in the device's adapter pool, its prefix, which lies in the cache, aside.

        Up to 63 a tensor of them are for alignment.
        """
        return sum(-(-each.nbytes // ALIGNMENT_BYTES) for each in self.tensors) * ALIGNMENT_BYTES

    @property
    def _stored(self) -> tuple[Tensor, ...]:
        return self.tensors if self.prefix is None else (*self.tensors, *self.prefix.tensors)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _spread(offsets: Sequence[int], *tensors: Tensor | None) -> tuple[int, ...]:
    """The offsets of the tensors that are there, -1 for the others."""
    following = iter(offsets)
    return tuple(-1 if tensor is None else next(following) for tensor in tensors)
