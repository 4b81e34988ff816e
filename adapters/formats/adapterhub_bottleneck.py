"""AdapterHub's bottlenecks, whatever their projections are made of (``BnConfig``).

With h what a half of a layer computed, r the residual stream before it, and in adapters 1.3.0

    u = s (U f(D z + d) + e),     out = u + h + c r, what the half and its residual become

where z is r if ``is_parallel``, else h + r if ``original_ln_before``, else h, and c counts how
often r is added: once by ``original_ln_after``, and once by ``original_ln_before`` without
``residual_before_ln``, for then the adapter's own residual is h + r. All of the library's
ready-made configurations have c = 1. Otherwise (c - 1) r is a bottleneck of its own, with
identities for projections, which all layers share.

In ``original_ln_before`` and its like, "ln" is the model's own norm behind a half, which decoders
that normalise before each half do not have.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.bottleneck.op import Activation, Source
from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..kind import Lowered, PrimitiveShape
from ..layout import Half
from ..primitives.layer import Bottleneck
from ..primitives.lowered import Part
from ..scope import EveryPosition
from .activations import read_activation
from .adapterhub import NOT_CAUSAL
from .adapterhub_tensors import (
    BOTTLENECKS,
    Modules,
    check_layers,
    check_names,
    check_shape,
    layer_number,
    read_layers,
)
from .binding import cast, layer_site, mismatch
from .config_fields import FieldRules, finite_number, flag

MAX_WIDTH = 16384
_LEAST_REDUCTION = 1e-4

_HALVES: Mapping[str, Half] = {
    "attention_adapters": Half.ATTENTION,
    "output_adapters": Half.MLP,
}
_SCALES = ("learned", "channel")
_NO_NORM = "the engine's bottleneck has no norm of its own: train without"

RULES = FieldRules(
    implemented=frozenset(
        {
            "architecture",
            "mh_adapter",
            "output_adapter",
            "reduction_factor",
            "non_linearity",
            "original_ln_before",
            "original_ln_after",
            "residual_before_ln",
            "is_parallel",
            "scaling",
            "leave_out",
            "inv_adapter",
            "inv_adapter_reduction_factor",
            "phm_layer",
            "phm_dim",
            "phm_rank",
            "phm_bias",
            "factorized_phm_W",
            "shared_W_phm",
            "shared_phm_rule",
            "factorized_phm_rule",
        }
    ),
    harmless={
        "adapter_residual_before_ln": "says on which side of ln_after a sum is; that is refused",
        "init_weights": "initialization only",
        "init_weights_seed": "initialization only",
        "phm_c_init": "initialization only",
        "phm_init_range": "initialization only",
        "hypercomplex_nonlinearity": "initialization only, in spite of its name",
        "learn_phm": "freezes parameters in training",
        "dropout": "off outside training",
        "stochastic_depth": "off outside training",
        "cross_adapter": "decoders that are served have no cross-attention",
    },
    refused={
        "ln_before": _NO_NORM,
        "ln_after": _NO_NORM,
        "use_gating": NOT_CAUSAL,
        "invertible_adapter": "of adapter-transformers 1: save it again with a later version",
    },
)


class Projection(Protocol):
    """One of a bottleneck's two projections, y = W x + b."""

    @property
    def in_features(self) -> int:
        """Columns of W."""
        ...

    @property
    def out_features(self) -> int:
        """Rows of W."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """b (out,)."""
        ...

    def weight(self) -> Tensor:
        """W (out, in), float32."""
        ...


@dataclass(frozen=True, slots=True)
class Site:
    """One bottleneck as stored.

    Attributes:
        path: Of the module.
        layer_path: Of its layer.
        layer: Its number.
        half: Which half of it.
        down: (width, hidden).
        up: (hidden, width).
        scaling: The trained s, (1,) or (hidden,); None where the configuration has it.
    """

    path: str
    layer_path: str
    layer: int
    half: Half
    down: Projection
    up: Projection
    scaling: Tensor | None

    @property
    def num_elements(self) -> int:
        """Numbers of the primitive."""
        biases = [bias.numel() for bias in (self.down.bias, self.up.bias) if bias is not None]
        return 2 * self.down.in_features * self.down.out_features + sum(biases)


@dataclass(frozen=True, slots=True)
class Options:
    """What the configuration says about all of the bottlenecks.

    Attributes:
        halves: Those that have one.
        activation: f.
        source: z.
        residual: c - 1.
        scaling: s, None where it is a tensor.
        channels: Whether that tensor is one per channel.
        left_out: Layers without any.
        reduction: ``reduction_factor``.
    """

    halves: frozenset[Half]
    activation: Activation
    source: Source
    residual: int
    scaling: float | None
    channels: bool
    left_out: frozenset[int]
    reduction: object

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "Options":
        """Check every field of the configuration that is not about the projections' form.

        Raises:
            AdapterUnsupported: It is not served.
            AdapterCorrupt: It is not what the library writes.
        """
        RULES.check(config)
        scaling = config.get("scaling", 1.0)
        trained = isinstance(scaling, str)
        if trained and scaling not in _SCALES:
            raise AdapterUnsupported(f"the config field 'scaling' is {shown(scaling)}")
        return cls(
            halves=frozenset(_halves(config)),
            activation=read_activation("non_linearity", config.get("non_linearity")),
            source=_source(config),
            residual=_residual(config),
            scaling=None if trained else finite_number("scaling", scaling),
            channels=scaling == "channel",
            left_out=read_layers("leave_out", config.get("leave_out", [])),
            reduction=config.get("reduction_factor"),
        )

    def check_width(self, layer: int, hidden: int, width: int) -> None:
        """Raise AdapterCorrupt unless the width is what ``reduction_factor`` gives."""
        factor = self.reduction
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default"))
        number = finite_number("reduction_factor", factor)
        if number < _LEAST_REDUCTION or max(1, int(hidden // number)) != width:
            raise AdapterCorrupt(
                f"the bottleneck of layer {layer} is {width} wide, and reduction_factor is "
                f"{shown(factor)} of {hidden}"
            )


@dataclass(frozen=True, slots=True)
class ParsedBottlenecks:
    """The bottlenecks of one configuration."""

    options: Options
    sites: tuple[Site, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """One Bottleneck a site, and those that change the residual."""
        shapes = [
            PrimitiveShape(Bottleneck.__name__, site.path, 0, site.num_elements)
            for site in self.sites
        ]
        if self.options.residual:
            hidden = self.sites[0].down.in_features
            identities = hidden * hidden * (1 if self.options.residual > 0 else 2)
            shapes.append(PrimitiveShape(Bottleneck.__name__, "", 0, identities))
        return tuple(shapes)

    def lower(self, base: Base) -> Lowered:
        """One part of bottlenecks, and a second where the residual stream changes."""
        for half in self.options.halves:
            found = [site.layer for site in self.sites if site.half is half]
            check_layers(base.layout, found, self.options.left_out)
        bound = [self._lower(site, base) for site in self.sites]
        bound.sort(key=lambda each: each.row)
        parts = [Part(EveryPosition(), tuple(bound))]
        if self.options.residual:
            parts.append(Part(EveryPosition(), tuple(_residuals(bound, self.options, base))))
        return Lowered(tuple(parts))

    def _lower(self, site: Site, base: Base) -> Bottleneck:
        layout = base.layout
        layer = layer_site(layout, site.layer_path)
        if site.down.in_features != layout.hidden_size:
            raise mismatch(layout, f"{shown(site.path)} reads {site.down.in_features} features")
        scale: Tensor | float = 1.0 if self.options.scaling is None else self.options.scaling
        if site.scaling is not None:
            scale = site.scaling.float()
        down_bias, up_bias = site.down.bias, site.up.bias
        return Bottleneck(
            layer=layer,
            half=site.half,
            source=self.options.source,
            activation=self.options.activation,
            down=cast(site.path, site.down.weight(), base.dtype),
            up=cast(site.path, site.up.weight().T * scale, base.dtype),
            down_bias=None if down_bias is None else cast(site.path, down_bias, base.dtype),
            up_bias=None
            if up_bias is None
            else cast(site.path, up_bias.float() * scale, base.dtype),
        )


@dataclass(frozen=True, slots=True)
class ProjectionPair:
    """Two projections, and the names of the tensors they are made of."""

    down: Projection
    up: Projection
    names: frozenset[str]


class ReadProjections(Protocol):
    """Makes the projections of the module at a path from its tensors."""

    def __call__(self, path: str, tensors: Mapping[str, Tensor]) -> ProjectionPair:
        """Raise AdapterCorrupt where they contradict each other or are missing."""
        ...


def claims_site(config: Mapping[str, object], container: str, path: str) -> bool:
    """Whether the configuration has a bottleneck there: its half, and a layer not left out."""
    name = path.rpartition(".")[2]
    if container != BOTTLENECKS or name not in _HALVES:
        return False
    left_out = read_layers("leave_out", config.get("leave_out", []))
    return _HALVES[name] in _halves(config) and layer_number(path) not in left_out


def parse_bottlenecks(
    options: Options, modules: Modules, read_projections: ReadProjections
) -> ParsedBottlenecks:
    """Check every module against the configuration.

    Raises:
        AdapterUnsupported: A tensor that the configuration does not have.
        AdapterCorrupt: Shapes contradict each other or the configuration; or there is no module.
    """
    sites = tuple(
        _site(options, path, tensors, read_projections) for path, tensors in modules.items()
    )
    if not sites:
        raise AdapterCorrupt("the weight file holds no bottleneck at all")
    return ParsedBottlenecks(options, sites)


def _site(
    options: Options, path: str, tensors: Mapping[str, Tensor], read_projections: ReadProjections
) -> Site:
    match = re.fullmatch(r"(.*)\.(attention_adapters|output_adapters)", path)
    if match is None:
        raise AdapterUnsupported(f"{shown(path)} is not a place for a bottleneck that is served")
    pair = read_projections(path, tensors)
    scaling = ("scaling",) if options.scaling is None else ()
    check_names(path, tensors, (*pair.names, *scaling))
    layer, hidden, width = layer_number(path), pair.down.in_features, pair.down.out_features
    if (pair.up.out_features, pair.up.in_features) != (hidden, width):
        raise AdapterCorrupt(
            f"{shown(path)} goes from {hidden} to {width}, and from {pair.up.in_features} to "
            f"{pair.up.out_features}"
        )
    if width > MAX_WIDTH:
        raise AdapterUnsupported(f"{shown(path)} is {width} wide, more than {MAX_WIDTH}")
    options.check_width(layer, hidden, width)
    for name in scaling:
        check_shape(path, name, tensors[name], hidden if options.channels else 1)
    return Site(
        path=path,
        layer_path=match[1],
        layer=layer,
        half=_HALVES[match[2]],
        down=pair.down,
        up=pair.up,
        scaling=tensors["scaling"] if scaling else None,
    )


def _halves(config: Mapping[str, object]) -> Iterator[Half]:
    for name, half in (("mh_adapter", Half.ATTENTION), ("output_adapter", Half.MLP)):
        if flag(name, config.get(name)):
            yield half


def _source(config: Mapping[str, object]) -> Source:
    if flag("is_parallel", config.get("is_parallel", False)):
        return Source.RESIDUAL
    before = flag("original_ln_before", config.get("original_ln_before", False))
    return Source.SUM if before else Source.OUTPUT


def _residual(config: Mapping[str, object]) -> int:
    """c - 1."""
    added = int(flag("original_ln_after", config.get("original_ln_after", True)))
    own = config.get("residual_before_ln", True)
    if own == "post_add":
        raise AdapterUnsupported(
            "the config field 'residual_before_ln' is 'post_add', on which the library fails in "
            "decoders without a norm behind each half: train without"
        )
    if not flag("residual_before_ln", own) and _source(config) is Source.SUM:
        added += 1
    return added - 1


def _residuals(bound: Iterable[Bottleneck], options: Options, base: Base) -> Iterator[Bottleneck]:
    """(c - 1) r beside every bottleneck: I (c - 1) I r."""
    down = torch.eye(base.layout.hidden_size, dtype=base.dtype)
    up = down if options.residual > 0 else -down
    for each in bound:
        yield Bottleneck(
            each.layer, each.half, Source.RESIDUAL, Activation.LINEAR, down=down, up=up
        )
