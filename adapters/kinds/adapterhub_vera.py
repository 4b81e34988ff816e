"""VeRA and DVoRA (arXiv:2310.11454) as AdapterHub stores and computes them.

    y += s vera_B B vera_D A x,   s = alpha / r

with A (r, in) and B (out, r) shared by all modules (``shared_parameters``), and vera_D (r, r) and
vera_B (out, out) of the module: whole matrices, where the paper has diagonals. With ``use_dora``
the module has a magnitude besides; see ``adapterhub_dora``. A lies on the device once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod, claims_all
from ..formats.adapterhub_dora import magnitude_affine
from ..formats.adapterhub_lora import LoraScalars, is_dora, is_fused, is_lora, is_vera
from ..formats.adapterhub_tensors import LORAS, SHARED, Tensors, check_names, check_shape
from ..formats.binding import cast, linear_target
from ..kind import KindPage, Lowered, PrimitiveShape
from ..primitives.linear import Affine
from ..primitives.lowered import Part
from ..scope import EveryPosition

PAGE = KindPage(
    title="VeRA and DVoRA (arXiv:2310.11454)",
    family="reparameterisation",
    files="As lora, with vera_d or vera_b a number: loras.<name>.vera_D (r, r) and vera_B "
    "(out, out); shared_parameters.<name>.lora_A (r, in) and lora_B (out, r); m.weight with "
    "use_dora",
    equation="y += alpha / r * D x with D = vera_B B vera_D A; with use_dora as dora with this D",
    primitives=("Affine",),
    memory="r * in once, r * out a module; out more with use_dora",
    limits="GPT-2's c_attn, and Conv1D with use_dora (the library fails); modules of different "
    "shapes (the library fails); use_gating; r above 4096",
)


@dataclass(frozen=True, slots=True)
class _Module:
    """One module as stored: d (r, r), b (out, out), m (out, 1) or None."""

    path: str
    d: Tensor
    b: Tensor
    m: Tensor | None


@dataclass(frozen=True, slots=True)
class _ParsedVera:
    scalars: LoraScalars
    a: Tensor
    b: Tensor
    modules: tuple[_Module, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return tuple(
            PrimitiveShape(
                Affine.__name__,
                each.path,
                self.scalars.rank,
                self.b.numel()
                + (self.a.numel() if index == 0 else 0)
                + (0 if each.m is None else each.m.numel()),
            )
            for index, each in enumerate(self.modules)
        )

    def lower(self, base: Base) -> Lowered:
        self.scalars.check_layers(base.layout, (each.path for each in self.modules))
        a = cast("lora_A", self.a, base.dtype)
        bound = [self._lower(each, base, a) for each in self.modules]
        bound.sort(key=lambda each: each.row)
        return Lowered((Part(EveryPosition(), tuple(bound)),))

    def _lower(self, module: _Module, base: Base, a: Tensor) -> Affine:
        target = linear_target(base.layout, module.path, self.a.shape[1], self.b.shape[0])
        b = module.b.float() @ (self.b.float() @ module.d.float())
        scale = self.scalars.scale
        if module.m is not None:
            magnitude = module.m[:, 0]
            return magnitude_affine(base, target, self.a, b, scale, magnitude, stored_a=a)
        return Affine(target, a=a, b=cast(module.path, (b * scale).T, base.dtype))


def _matches(config: Config) -> bool:
    return is_lora(config) and is_vera(config)


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    scalars = LoraScalars.read(config, envelope)
    modules = tensors.get(LORAS, {})
    scalars.check_modules(modules)
    shared = tensors.get(SHARED, {})
    if set(shared) != {envelope.stem}:
        raise AdapterCorrupt(f"the shared matrices are at {shown(sorted(shared))}, not in one")
    inside = shared[envelope.stem]
    check_names("shared_parameters", inside, ("lora_A", "lora_B"))
    a, b = inside["lora_A"], inside["lora_B"]
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == scalars.rank:
        raise AdapterCorrupt(
            f"the shared matrices have rank {scalars.rank} by the configuration, and are "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    return _ParsedVera(
        scalars,
        a,
        b,
        tuple(
            _module(path, each, scalars.rank, b.shape[0], is_dora(config))
            for path, each in modules.items()
        ),
    )


KIND = MethodKind("vera", PAGE, Method(_matches, claims_all(LORAS, SHARED), _parse))


def _module(
    path: str, tensors: Mapping[str, Tensor], rank: int, out_features: int, has_magnitude: bool
) -> _Module:
    if is_fused(path):
        raise AdapterUnsupported(
            f"{shown(path)} is fused, on which the library's own VeRA fails: train LoRA there"
        )
    check_names(path, tensors, ("vera_D", "vera_B", *(("m.weight",) if has_magnitude else ())))
    check_shape(path, "vera_D", tensors["vera_D"], rank, rank)
    check_shape(path, "vera_B", tensors["vera_B"], out_features, out_features)
    magnitude = tensors["m.weight"] if has_magnitude else None
    if magnitude is not None:
        check_shape(path, "m.weight", magnitude, out_features, 1)
    return _Module(path, tensors["vera_D"], tensors["vera_B"], magnitude)
