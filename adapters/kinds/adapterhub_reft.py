"""ReFT (arXiv:2404.03592) as AdapterHub stores and computes it: LoReFT, NoReFT, DiReFT.

    x += Rᵀ (f(W x + b) - R x)        or, without ``subtract_projection``,   x += Rᵀ f(W x + b)

on the output x of a layer, with W (r, hidden) ``learned_source`` and R (r, hidden) ``projection``,
at the first ``prefix_positions`` and the last ``suffix_positions`` of the sequence; where these
overlap, the suffix has it. With f the identity that is one bottleneck, D = W - R and U = R; else it
is the sum of two. With ``orthogonality``, R comes out of torch's parametrisation by Householder
reflections.

``subtract_projection`` is lost when the library saves, so that DiReFT comes back as NoReFT there.
It is true unless ``deltamux.json`` or the configuration says otherwise.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.bottleneck.op import Activation, Source
from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.activations import read_activation
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod, claims_all
from ..formats.adapterhub_tensors import (
    REFTS,
    Modules,
    Tensors,
    check_names,
    check_shape,
    layer_number,
    read_layers,
)
from ..formats.binding import cast, layer_site, mismatch
from ..formats.config_fields import FieldRules, flag, positive_int
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import BaseLayout, Half
from ..primitives.layer import Bottleneck
from ..primitives.lowered import Part
from ..scope import PromptHead, PromptTail, Scope

MAX_RANK = 4096
MAX_POSITIONS = 1 << 20

SUBTRACT = "subtract_projection"
OPTIONS = {
    SUBTRACT: "false for DiReFT, which the library saves as if it were NoReFT; true without it"
}

_WEIGHT, _BIAS = "learned_source.weight", "learned_source.bias"
_PLAIN = "projection.weight"
_ORTHOGONAL = (
    "projection.parametrizations.weight.original",
    "projection.parametrizations.weight.0.base",
)

PAGE = KindPage(
    title="ReFT: LoReFT, NoReFT, DiReFT (arXiv:2404.03592)",
    family="addition",
    files="adapter_config.json with architecture reft; per layer refts.<name>.units.0 (prefix) and "
    "units.1 (suffix): learned_source.weight and .bias, projection.weight, or its orthogonal "
    "parametrisation",
    equation="x += R^T (f(W x + b) - R x) on a layer's output, at the first and last positions of "
    "the prompt; the prefix goes on into the output where the prompt is shorter, and without a "
    "suffix",
    primitives=("Bottleneck",),
    memory="2 * r * hidden + r a layer and unit; r * hidden more where f is not the identity",
    limits="orthogonality with r equal to the hidden size; a bottleneck behind the MLP of the same "
    "layer in a union. The suffix stays where the prompt ends. With both, the library mixes up the "
    "rows of prompts shorter than suffix_positions; here they get the suffix's unit, unless what "
    "the library does is the prefix's unit throughout",
    options=OPTIONS,
)

RULES = FieldRules(
    implemented=frozenset(
        {
            "architecture",
            "layers",
            "prefix_positions",
            "suffix_positions",
            "r",
            "orthogonality",
            "tied_weights",
            "non_linearity",
            SUBTRACT,
            "output_reft",
        }
    ),
    harmless={
        "dropout": "off outside training",
        "dtype": "of the tensors, which say it themselves",
        "init_weights_seed": "initialization only",
    },
    refused={},
)


@dataclass(frozen=True, slots=True)
class _Options:
    """The configuration."""

    layers: frozenset[int] | None
    head: int
    tail: int
    rank: int
    orthogonal: bool
    tied: bool
    subtract: bool
    activation: Activation

    @classmethod
    def read(cls, config: Mapping[str, object], envelope: Envelope) -> "_Options":
        RULES.check(config)
        layers = config.get("layers")
        function = config.get("non_linearity")
        found = cls(
            layers=None if layers == "all" else read_layers("layers", layers),
            head=_positions("prefix_positions", config.get("prefix_positions")),
            tail=_positions("suffix_positions", config.get("suffix_positions")),
            rank=positive_int("r", config.get("r")),
            orthogonal=flag("orthogonality", config.get("orthogonality")),
            tied=flag("tied_weights", config.get("tied_weights", False)),
            subtract=flag(SUBTRACT, envelope.options.get(SUBTRACT, config.get(SUBTRACT, True))),
            activation=Activation.LINEAR
            if function is None
            else read_activation("non_linearity", function),
        )
        if not flag("output_reft", config.get("output_reft", True)):
            raise AdapterUnsupported("output_reft is false, so that the adapter does nothing")
        if found.head == found.tail == 0:
            raise AdapterUnsupported("it has no positions, so that the adapter does nothing")
        if found.rank > MAX_RANK:
            raise AdapterUnsupported(f"the config field 'r' is {found.rank}, more than {MAX_RANK}")
        return found

    @property
    def units(self) -> tuple[int, ...]:
        """Numbers of the units that are stored."""
        return (0,) if self.tied else (0, 1)

    @property
    def scopes(self) -> Iterator[tuple[int, Scope]]:
        """The unit and the positions of each end."""
        if self.head:
            yield 0, PromptHead(self.head, self.tail)
        if self.tail:
            yield 0 if self.tied else 1, PromptTail(self.tail, self.head)


@dataclass(frozen=True, slots=True)
class _Unit:
    """One unit as stored: w (r, hidden), b (r,), r as it is or its parametrisation."""

    w: Tensor
    b: Tensor
    projection: tuple[Tensor, ...]

    def matrix(self) -> Tensor:
        """R (r, hidden), float32."""
        if len(self.projection) == 1:
            return self.projection[0].float()
        original, base = (tensor.float() for tensor in self.projection)
        return _orthogonal(original, base)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's units."""

    path: str
    units: tuple[_Unit, ...]

    @property
    def layer_path(self) -> str:
        return self.path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class _ParsedReft:
    options: _Options
    layers: tuple[_Layer, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """One Bottleneck a layer and unit, or two that share U."""
        rank, hidden = self.layers[0].units[0].w.shape
        sizes = [rank * (2 * hidden + 1)]
        if self.options.subtract and not self._is_one:
            sizes.append(rank * hidden)
        units = {unit for unit, _ in self.options.scopes}
        return tuple(
            PrimitiveShape(Bottleneck.__name__, each.path, 0, size)
            for each in self.layers
            for _ in units
            for size in sizes
        )

    @property
    def _is_one(self) -> bool:
        return self.options.activation is Activation.LINEAR

    def lower(self, base: Base) -> Lowered:
        self._check_layers(base.layout)
        units = {unit for unit, _ in self.options.scopes}
        made = {unit: [self._lower(each, unit, base) for each in self.layers] for unit in units}
        parts = [
            Part(scope, tuple(sorted(primitives, key=lambda each: each.row)))
            for unit, scope in self.options.scopes
            for primitives in zip(*made[unit], strict=True)
        ]
        return Lowered(tuple(parts))

    def _check_layers(self, layout: BaseLayout) -> None:
        found = {layer_number(each.path) for each in self.layers}
        expected = set(range(layout.num_layers))
        if self.options.layers is not None:
            expected &= self.options.layers
        if found != expected:
            raise mismatch(layout, f"it changes the layers {shown(sorted(found), 80)} alone")

    def _lower(self, layer: _Layer, unit: int, base: Base) -> Sequence[Bottleneck]:
        """One bottleneck, or two whose sum it is: each for a part of its own."""
        site = layer_site(base.layout, layer.layer_path)
        stored, path = layer.units[unit], layer.path
        if stored.w.shape[1] != base.layout.hidden_size:
            raise mismatch(base.layout, f"{shown(path)} reads {stored.w.shape[1]} features")
        r, w = stored.matrix(), stored.w.float()
        up = cast(path, r, base.dtype)
        bias = cast(path, stored.b, base.dtype)
        options = self.options
        merged = options.subtract and self._is_one
        down = cast(path, w - r if merged else w, base.dtype)
        first = Bottleneck(site, Half.MLP, Source.SUM, options.activation, down, up, bias)
        if merged or not options.subtract:
            return (first,)
        back = cast(path, -r, base.dtype)
        return first, Bottleneck(site, Half.MLP, Source.SUM, Activation.LINEAR, back, up)


def _matches(config: Config) -> bool:
    return config.get("architecture") == "reft"


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    options = _Options.read(config, envelope)
    return _ParsedReft(options, tuple(_layers(tensors.get(REFTS, {}), options)))


KIND = MethodKind("reft", PAGE, Method(_matches, claims_all(REFTS), _parse))


def _layers(modules: Modules, options: _Options) -> Iterator[_Layer]:
    if not modules:
        raise AdapterCorrupt("the weight file holds no ReFT at all")
    names = (_WEIGHT, _BIAS, *(_ORTHOGONAL if options.orthogonal else (_PLAIN,)))
    for path, tensors in modules.items():
        if not re.fullmatch(r".*\.reft_layer", path):
            raise AdapterUnsupported(f"{shown(path)} is not a place for ReFT that is served")
        check_names(path, tensors, [f"units.{unit}.{n}" for unit in options.units for n in names])
        yield _Layer(path, tuple(_unit(path, tensors, unit, options) for unit in options.units))


def _unit(path: str, tensors: Mapping[str, Tensor], number: int, options: _Options) -> _Unit:
    def part(name: str) -> Tensor:
        return tensors[f"units.{number}.{name}"]

    rank, w = options.rank, part(_WEIGHT)
    hidden = w.shape[-1] if w.dim() == 2 else 0
    if hidden == 0:
        raise AdapterCorrupt(f"{_WEIGHT} of {shown(path)} is {list(w.shape)}")
    check_shape(path, _WEIGHT, w, rank, hidden)
    check_shape(path, _BIAS, part(_BIAS), rank)
    if not options.orthogonal:
        check_shape(path, _PLAIN, part(_PLAIN), rank, hidden)
        return _Unit(w, part(_BIAS), (part(_PLAIN),))
    original, base = (part(name) for name in _ORTHOGONAL)
    check_shape(path, _ORTHOGONAL[0], original, rank, hidden)
    check_shape(path, _ORTHOGONAL[1], base, hidden, hidden)
    if rank >= hidden:
        raise AdapterUnsupported(
            f"orthogonality with r {rank} of {hidden} is not served: torch parametrises a square "
            f"matrix in another way; every r below is"
        )
    return _Unit(w, part(_BIAS), (original, base))


def _orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """R (r, hidden) of ``torch.nn.utils.parametrizations.orthogonal``, by Householder reflections.

    With X = originalᵀ, A its part below the diagonal and tau = 2 / (1 + ‖A_j‖²): R is the transpose
    of base H(A, tau) diag(X), the signs of the diagonal taken as integers.
    """
    x = original.T
    a = x.tril(diagonal=-1)
    tau = 2.0 / (1.0 + (a * a).sum(dim=0))
    q = torch.linalg.householder_product(a, tau) * x.diagonal().int()
    projection: Tensor = (base @ q).T
    return projection


def _positions(name: str, value: object) -> int:
    if value == 0 and value is not False:
        return 0
    return min(positive_int(name, value), MAX_POSITIONS)
