"""AdapterHub's invertible adapters (MAD-X, arXiv:2005.00052), which stand behind the embedding.

With the halves x1, x2 of the embedded token, NICE (arXiv:1410.8516) computes

    y1 = x1 + F(x2),   y2 = x2 + G(y1),   F(x) = W2 f(W1 x + b1) + b2, and G alike.

Nothing but the token goes in, where positions are not embedded, so that the result is an embedding
table of its own. The library inverts it before the head in the models that it hooks from outside
and in those with heads of its own; those are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.bottleneck.op import Activation
from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..kind import Lowered, PrimitiveShape
from ..primitives.embedding import EmbeddingRows
from ..primitives.lowered import Part
from ..scope import EveryPosition
from .activations import activate, read_activation
from .adapterhub import Envelope, ParsedMethod
from .adapterhub_tensors import INVERTIBLE, Tensors, check_names, check_shape
from .binding import cast, mismatch
from .config_fields import finite_number
from .peft_tensors import required

_WITHOUT_INVERSE = ("llama", "mistral")
"""Base types whose embedding the library changes, and nothing else."""

_HEAD = "ForCausalLM"
"""End of the name of their classes with a language-model head."""

_PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class _Coupling:
    """F or G: W1 (m, in), b1 (m,), W2 (out, m), b2 (out,)."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def of(self, activation: Activation, x: Tensor) -> Tensor:
        inner = functional.linear(x, self.first.float(), self.first_bias.float())
        return functional.linear(
            activate(activation, inner), self.second.float(), self.second_bias.float()
        )


@dataclass(frozen=True, slots=True)
class _WithInvertible:
    """Another method, and NICE behind the embedding."""

    method: ParsedMethod
    path: str
    activation: Activation
    f: _Coupling
    g: _Coupling

    @property
    def hidden(self) -> int:
        """Width of the embedding."""
        return self.f.second.shape[0] + self.g.second.shape[0]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """The method's, and rows that depend on the base."""
        return (*self.method.shapes, PrimitiveShape(EmbeddingRows.__name__, self.path, 0, 0))

    def lower(self, base: Base) -> Lowered:
        """The method's parts, the first with every row of the token embedding besides."""
        lowered = self.method.lower(base)
        first, *others = lowered.parts
        rows = EmbeddingRows(base.layout.token_embedding, self._rows(base))
        return Lowered((Part(EveryPosition(), (rows, *first.primitives)), *others), lowered.prefix)

    def _rows(self, base: Base) -> Tensor:
        layout = base.layout
        if self.hidden != layout.hidden_size:
            raise mismatch(layout, f"{shown(self.path)} changes {self.hidden} features")
        own = base.embedding(layout.token_embedding)
        rows = torch.empty_like(own)
        for start in range(0, len(own), _ROWS_AT_ONCE):
            x = own[start : start + _ROWS_AT_ONCE].float()
            y = self._changed(x)
            rows[start : start + _ROWS_AT_ONCE] = cast(self.path, y, base.dtype)
        return rows

    def _changed(self, x: Tensor) -> Tensor:
        x1, x2 = x[:, : self.hidden // 2], x[:, self.hidden // 2 :]
        y1 = x1 + self.f.of(self.activation, x2)
        return torch.cat([y1, x2 + self.g.of(self.activation, y1)], dim=1)


def claims_invertible(config: Mapping[str, object], container: str) -> bool:
    """Whether the configuration has an invertible adapter and the container holds them."""
    return container == INVERTIBLE and bool(config.get("inv_adapter"))


def with_invertible(
    parsed: ParsedMethod, config: Mapping[str, object], envelope: Envelope, tensors: Tensors
) -> ParsedMethod:
    """The parsed bottlenecks, with the invertible adapter that the configuration asks for, if any.

    Raises:
        AdapterUnsupported: It is of another form than NICE, or of a model where it is inverted.
        AdapterCorrupt: Its tensors contradict each other or the configuration.
    """
    form = config.get("inv_adapter")
    if not form:
        return parsed
    _check_served(form, envelope)
    modules = tensors.get(INVERTIBLE, {})
    if len(modules) != 1:
        raise AdapterCorrupt("the weight file holds no invertible adapter, or several")
    ((path, inside),) = modules.items()
    check_names(path, inside, [f"{name}.{part}" for name in "FG" for part in _PARTS])
    found = _WithInvertible(
        method=parsed,
        path=path,
        activation=read_activation("non_linearity", config.get("non_linearity")),
        f=_Coupling(*required(path, inside, *(f"F.{part}" for part in _PARTS))),
        g=_Coupling(*required(path, inside, *(f"G.{part}" for part in _PARTS))),
    )
    name = "inv_adapter_reduction_factor"
    _check_shapes(path, found, finite_number(name, config.get(name)))
    return found


def _check_served(form: object, envelope: Envelope) -> None:
    if form != "nice":
        raise AdapterUnsupported(
            f"the config field 'inv_adapter' is {shown(form)}: the library itself computes only "
            f"'nice': train with that"
        )
    if envelope.model_type not in _WITHOUT_INVERSE or not envelope.model_class.endswith(_HEAD):
        raise AdapterUnsupported(
            f"the config field 'inv_adapter' is not served for {shown(envelope.model_type)} in "
            f"{shown(envelope.model_class)}: it reads positions too, or is inverted before the "
            f"head: train without"
        )


def _check_shapes(path: str, found: _WithInvertible, factor: float) -> None:
    if found.f.second.dim() != 2 or found.g.second.dim() != 2 or factor < 1e-4:
        raise AdapterCorrupt(f"the invertible adapter of {shown(path)} has no sane shapes")
    first, second = found.hidden // 2, found.hidden - found.hidden // 2
    for name, part, reads, writes in (("F", found.f, second, first), ("G", found.g, first, second)):
        width = int(reads // factor)
        check_shape(path, f"{name}.0.weight", part.first, width, reads)
        check_shape(path, f"{name}.0.bias", part.first_bias, width)
        check_shape(path, f"{name}.2.weight", part.second, writes, width)
        check_shape(path, f"{name}.2.bias", part.second_bias, writes)
