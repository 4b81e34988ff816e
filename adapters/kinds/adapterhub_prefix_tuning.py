"""Prefix tuning (arXiv:2101.00190) as AdapterHub stores and computes it.

    kv (P, 2 L, heads, head_dim) = W2 f(W1 e + b1) + b2       e ``wte.weight`` (P, hidden)

or, with ``flat``, stored as it is. Layer l gets keys kv[:, 2 l] and values kv[:, 2 l + 1] before
those of the request, after these are rotated; every token attends to all of them, and no position
is shifted. L counts the layers that ``leave_out`` does not name; the others get none. The same
tensors are saved once for the model and once more for each layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.bottleneck.op import Activation
from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.activations import activate, read_activation
from ..formats.adapterhub import (
    NOT_CAUSAL,
    Config,
    Envelope,
    Method,
    MethodKind,
    ParsedMethod,
    claims_all,
)
from ..formats.adapterhub_tensors import (
    PREFIX_GATES,
    PREFIXES,
    Modules,
    Tensors,
    check_names,
    check_shape,
    read_layers,
)
from ..formats.binding import cast, mismatch
from ..formats.config_fields import FieldRules, flag, positive_int
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import BaseLayout
from ..primitives.lowered import KVPrefix

MAX_INNER = 16384
MAX_LENGTH = 1 << 16

_SITE = "self_prefix"
_MLP = (
    "wte.weight",
    "control_trans.0.weight",
    "control_trans.0.bias",
    "control_trans.2.weight",
    "control_trans.2.bias",
)

PAGE = KindPage(
    title="Prefix tuning (arXiv:2101.00190)",
    family="addition",
    files="adapter_config.json with architecture prefix_tuning; prefix_tunings.<name>.self_prefix: "
    "wte.weight, control_trans.0 and control_trans.2, or with flat control_trans alone; saved for "
    "the model and again for each layer",
    equation="keys and values of layer l: rows 2 l and 2 l + 1 of W2 f(W1 e + b1) + b2; positions "
    "are not shifted",
    primitives=("KVPrefix",),
    memory="P keys and values of every layer, in cache blocks",
    limits="use_gating (its gate is a mean over the whole sequence); bases with a sliding window, "
    "outside of which the library still attends to the prefix; the library offers it for Llama, "
    "Mistral and GPT-2, not for Qwen",
)

RULES = FieldRules(
    implemented=frozenset(
        {
            "architecture",
            "flat",
            "prefix_length",
            "bottleneck_size",
            "non_linearity",
            "leave_out",
        }
    ),
    harmless={
        "encoder_prefix": "decoders that are served have no encoder",
        "cross_prefix": "decoders that are served have no cross-attention",
        "dropout": "off outside training",
        "shared_gating": "read only with use_gating",
        "init_weights_seed": "initialization only",
    },
    refused={
        "use_gating": NOT_CAUSAL,
    },
)


class _Parametrisation(Protocol):
    """Where keys and values come from."""

    @property
    def width(self) -> int:
        """Numbers that a position has in all layers, keys and values."""
        ...

    def value(self) -> Tensor:
        """(P, width), float32."""
        ...


@dataclass(frozen=True, slots=True)
class _Flat:
    """(P * width,)."""

    length: int
    stored: Tensor

    @property
    def width(self) -> int:
        return self.stored.numel() // self.length

    def value(self) -> Tensor:
        return self.stored.float().view(self.length, -1)


@dataclass(frozen=True, slots=True)
class _Mlp:
    """e (P, hidden), W1 (m, hidden), b1 (m,), W2 (width, m), b2 (width,)."""

    activation: Activation
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

    @property
    def width(self) -> int:
        return self.tensors[3].shape[0]

    def value(self) -> Tensor:
        e, w1, b1, w2, b2 = (tensor.float() for tensor in self.tensors)
        return functional.linear(activate(self.activation, functional.linear(e, w1, b1)), w2, b2)


@dataclass(frozen=True, slots=True)
class _ParsedPrefix:
    path: str
    length: int
    left_out: frozenset[int]
    source: _Parametrisation

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return (PrimitiveShape(KVPrefix.__name__, "", 0, self.length * self.source.width),)

    def lower(self, base: Base) -> Lowered:
        layout = base.layout
        layers = tuple(each.index for each in layout.layers if each.index not in self.left_out)
        self._check_base(layout, len(layers))
        kv = self.source.value().view(
            self.length, len(layers), 2, layout.num_kv_heads, layout.head_dim
        )
        whole = kv.new_zeros(2, layout.num_layers, layout.num_kv_heads, *kv.shape[::4])
        whole[:, list(layers)] = kv.permute(2, 1, 3, 0, 4)
        keys, values = (cast(self.path, part, base.dtype) for part in whole)
        some = layers if self.left_out else None
        return Lowered((), KVPrefix(keys, values, position_offset=0, layers=some))

    def _check_base(self, layout: BaseLayout, num_layers: int) -> None:
        if layout.has_windows:
            raise AdapterUnsupported(
                "the base attends in a sliding window, and AdapterHub's prefix would stay in sight "
                "beyond it: train the prefix with PEFT"
            )
        width = 2 * num_layers * layout.num_kv_heads * layout.head_dim
        if self.source.width != width:
            raise mismatch(
                layout,
                f"a position of its prefix has {self.source.width} numbers, {width} in this cache",
            )
        if self.length > layout.max_position:
            raise AdapterUnsupported(
                f"the prefix has {self.length} positions, and the base {layout.max_position}"
            )


def _matches(config: Config) -> bool:
    return config.get("architecture") == "prefix_tuning"


def _parse(config: Config, _envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    RULES.check(config)
    left_out = read_layers("leave_out", config.get("leave_out", []))
    length = positive_int("prefix_length", config.get("prefix_length", 30))
    if length > MAX_LENGTH:
        raise AdapterUnsupported(f"prefix_length is {length}, more than {MAX_LENGTH}")
    for path in tensors.get(PREFIX_GATES, {}):
        raise AdapterUnsupported(f"the gate of {shown(path)} is not served: {NOT_CAUSAL}")
    path, inside = _one_copy(tensors.get(PREFIXES, {}))
    flat = flag("flat", config.get("flat", False))
    source = _flat(path, inside, length) if flat else _mlp(path, inside, length, config)
    return _ParsedPrefix(path, length, left_out, source)


KIND = MethodKind(
    "prefix_tuning", PAGE, Method(_matches, claims_all(PREFIXES, PREFIX_GATES), _parse)
)


def _one_copy(modules: Modules) -> tuple[str, Mapping[str, Tensor]]:
    """The prefix, which every layer has a copy of.

    Raises:
        AdapterCorrupt: Copies differ, or there is none.
    """
    copies = iter(modules.items())
    path, first = next(copies, ("", {}))
    if not first:
        raise AdapterCorrupt("the weight file holds no prefix at all")
    for other, copy in copies:
        if copy.keys() != first.keys() or not all(_same(copy[name], first[name]) for name in copy):
            raise AdapterCorrupt(f"the prefixes of {shown(path)} and {shown(other)} differ")
    return path, first


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


def _flat(path: str, tensors: Mapping[str, Tensor], length: int) -> _Flat:
    name = f"{_SITE}.control_trans"
    check_names(path, tensors, (name,))
    stored = tensors[name]
    if stored.dim() != 1 or stored.numel() == 0 or stored.numel() % length:
        raise AdapterCorrupt(f"{name} is {list(stored.shape)}, which is not for {length} positions")
    return _Flat(length, stored)


def _mlp(
    path: str, tensors: Mapping[str, Tensor], length: int, config: Mapping[str, object]
) -> _Mlp:
    names = [f"{_SITE}.{name}" for name in _MLP]
    check_names(path, tensors, names)
    e, w1, b1, w2, b2 = (tensors[name] for name in names)
    inner = positive_int("bottleneck_size", config.get("bottleneck_size", 512))
    if inner > MAX_INNER:
        raise AdapterUnsupported(f"bottleneck_size is {inner}, more than {MAX_INNER}")
    if e.dim() != 2 or w2.dim() != 2 or 0 in e.shape:
        raise AdapterCorrupt(f"the prefix of {shown(path)} has no sane shapes")
    hidden, width = e.shape[1], w2.shape[0]
    for name, tensor, shape in zip(
        names, (e, w1, b1, w2, b2), _mlp_shapes(length, hidden, inner, width), strict=True
    ):
        check_shape(path, name, tensor, *shape)
    activation = read_activation("non_linearity", config.get("non_linearity", "tanh"))
    return _Mlp(activation, (e, w1, b1, w2, b2))


def _mlp_shapes(length: int, hidden: int, inner: int, width: int) -> Iterator[tuple[int, ...]]:
    yield from ((length, hidden), (inner, hidden), (inner,), (width, inner), (width,))
