"""Corrections of norms, and beside the halves of layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...kernels.bottleneck import op as bottleneck
from ...kernels.bottleneck.op import Activation, Source
from ...kernels.norm_override import op as norm_override
from ...kernels.side_attention import op as side_attention
from ..layout import BaseLayout, Half, LayerSite, NormSite
from .primitive import present, spread


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
    def inner_size(self) -> int:
        """Nothing is kept."""
        return 0

    @property
    def is_sum(self) -> bool:
        """It replaces."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight, and bias where there is one."""
        return present(self.weight, self.bias)

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
    def inner_size(self) -> int:
        """Rows of the projections."""
        return self.down.shape[0]

    @property
    def is_sum(self) -> bool:
        """It adds to the half's output."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """D, U, d and u, as far as they are there."""
        return present(self.down, self.up, self.down_bias, self.up_bias)

    def cell(self, offsets: Sequence[int]) -> bottleneck.Cell:
        """See ``Primitive``."""
        at = spread(offsets, self.down, self.up, self.down_bias, self.up_bias)
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
    def inner_size(self) -> int:
        """Its attention keeps nothing."""
        return 0

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
