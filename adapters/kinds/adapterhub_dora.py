"""DoRA (arXiv:2402.09353) as AdapterHub stores and computes it.

    y = g * (W x + b + s B A x),   g_i = m_i / ‖(W + B A)_i‖,   s = alpha / r

with m ``m.weight`` (out, 1). See ``adapterhub_dora`` for what is other than in PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod, claims_all
from ..formats.adapterhub_dora import magnitude_affine
from ..formats.adapterhub_lora import LoraScalars, is_added, is_dora, is_fused, is_lora, is_vera
from ..formats.adapterhub_tensors import LORAS, Tensors, check_names, check_shape
from ..formats.binding import linear_target
from ..kind import KindPage, Lowered, PrimitiveShape
from ..primitives.linear import Affine
from ..primitives.lowered import Part
from ..scope import EveryPosition

PAGE = KindPage(
    title="DoRA (arXiv:2402.09353)",
    family="reparameterisation",
    files="As lora, with use_dora true: loras.<name>.lora_A, lora_B and m.weight (out, 1)",
    equation="y = g * (W x + b + alpha / r * B A x), g = m / norm of the rows of W + B A: the bias "
    "is scaled, and the norm is without alpha / r",
    primitives=("Affine",),
    memory="r * (in + out) + out a module",
    limits="GPT-2 (the library fails); use_gating; r above 4096",
)


@dataclass(frozen=True, slots=True)
class _Module:
    """One module as stored: a (r, in), b (out, r), m (out, 1)."""

    path: str
    a: Tensor
    b: Tensor
    m: Tensor


@dataclass(frozen=True, slots=True)
class _ParsedDora:
    scalars: LoraScalars
    modules: tuple[_Module, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return tuple(
            PrimitiveShape(
                Affine.__name__,
                each.path,
                each.a.shape[0],
                each.a.numel() + each.b.numel() + each.m.numel(),
            )
            for each in self.modules
        )

    def lower(self, base: Base) -> Lowered:
        self.scalars.check_layers(base.layout, (each.path for each in self.modules))
        bound = [self._lower(each, base) for each in self.modules]
        bound.sort(key=lambda each: each.row)
        return Lowered((Part(EveryPosition(), tuple(bound)),))

    def _lower(self, module: _Module, base: Base) -> Affine:
        a, b = module.a, module.b
        target = linear_target(base.layout, module.path, a.shape[1], b.shape[0])
        return magnitude_affine(base, target, a, b, self.scalars.scale, module.m[:, 0])


def _matches(config: Config) -> bool:
    dora = config.get("use_dora") not in (None, False)
    return is_lora(config) and dora and is_added(config) and not is_vera(config)


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    is_dora(config)
    scalars = LoraScalars.read(config, envelope)
    modules = tensors.get(LORAS, {})
    scalars.check_modules(modules)
    return _ParsedDora(
        scalars, tuple(_module(path, inside, scalars) for path, inside in modules.items())
    )


KIND = MethodKind("dora", PAGE, Method(_matches, claims_all(LORAS), _parse))


def _module(path: str, tensors: Mapping[str, Tensor], scalars: LoraScalars) -> _Module:
    if is_fused(path):
        raise AdapterUnsupported(
            f"{shown(path)} is a fused Conv1D, on which the library's own DoRA fails or is ignored"
        )
    check_names(path, tensors, ("lora_A", "lora_B", "m.weight"))
    a, b, m = (tensors[name] for name in ("lora_A", "lora_B", "m.weight"))
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == scalars.rank:
        raise AdapterCorrupt(
            f"{shown(path)} has rank {scalars.rank} by the configuration, and lora_A is "
            f"{list(a.shape)}, lora_B {list(b.shape)}"
        )
    check_shape(path, "m.weight", m, b.shape[0], 1)
    return _Module(path, a, b, m)
