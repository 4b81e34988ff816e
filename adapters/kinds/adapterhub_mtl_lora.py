"""MTL-LoRA (arXiv:2410.09437) as AdapterHub stores and computes it: one task of it.

    y += s sum_i p_i B_i diag(t) A x,   p = softmax(w / weights_sharpness),   s = alpha / r

with B (n, out, r) ``lora_B``, t (r,) ``task_specific.values`` and w (n,) ``weights``. A and B may
have been trained by several tasks at once; each task saves them, so that a task is a plain LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod, claims_all
from ..formats.adapterhub_lora import RULES, LoraScalars, is_added, is_dora, is_fused, is_vera
from ..formats.adapterhub_tensors import LORAS, Tensors, check_names, check_shape
from ..formats.binding import cast, linear_target
from ..formats.config_fields import FieldRules, finite_number, positive_int
from ..kind import KindPage, Lowered, PrimitiveShape
from ..primitives.linear import Affine
from ..primitives.lowered import Part
from ..scope import EveryPosition

MAX_PROJECTIONS = 256

PAGE = KindPage(
    title="MTL-LoRA (arXiv:2410.09437)",
    family="reparameterisation",
    files="As lora, with architecture mtl_lora: loras.<name>.lora_A (r, in), lora_B (n, out, r), "
    "task_specific.values (r,), weights (n,)",
    equation="y += alpha / r * (sum_i softmax(weights / weights_sharpness)_i B_i) diag(t) A x",
    primitives=("Affine",),
    memory="r * (in + out) a module",
    limits="GPT-2's c_attn and task_specific_matrix_type linear (the library fails); use_dora and "
    "VeRA (the library ignores them); use_gating; r above 4096",
)

MTL_RULES = FieldRules(
    implemented=RULES.implemented
    | {"n_up_projection", "task_specific_matrix_type", "weights_sharpness"},
    harmless=RULES.harmless,
    refused=RULES.refused,
)


@dataclass(frozen=True, slots=True)
class _Module:
    """One module as stored: a (r, in), b (n, out, r), t (r,), and p (n,)."""

    path: str
    a: Tensor
    b: Tensor
    t: Tensor
    p: Tensor

    def up(self) -> Tensor:
        """sum_i p_i B_i diag(t): (out, r), float32."""
        return torch.einsum("nor,n->or", self.b.float(), self.p) * self.t.float()


@dataclass(frozen=True, slots=True)
class _ParsedMtlLora:
    scalars: LoraScalars
    modules: tuple[_Module, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return tuple(
            PrimitiveShape(
                Affine.__name__,
                each.path,
                self.scalars.rank,
                each.a.numel() + each.b[0].numel(),
            )
            for each in self.modules
        )

    def lower(self, base: Base) -> Lowered:
        self.scalars.check_layers(base.layout, (each.path for each in self.modules))
        bound = [self._lower(each, base) for each in self.modules]
        bound.sort(key=lambda each: each.row)
        return Lowered((Part(EveryPosition(), tuple(bound)),))

    def _lower(self, module: _Module, base: Base) -> Affine:
        target = linear_target(base.layout, module.path, module.a.shape[1], module.b.shape[1])
        up = module.up().T * self.scalars.scale
        return Affine(
            target,
            a=cast(module.path, module.a, base.dtype),
            b=cast(module.path, up, base.dtype),
        )


def _matches(config: Config) -> bool:
    return config.get("architecture") == "mtl_lora"


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    scalars = LoraScalars.read(config, envelope, MTL_RULES)
    if is_dora(config) or is_vera(config) or not is_added(config):
        raise AdapterUnsupported(
            "MTL-LoRA goes with composition_mode 'add', and without use_dora, vera_d and vera_b"
        )
    form = config.get("task_specific_matrix_type", "singular_values")
    if form != "singular_values":
        raise AdapterUnsupported(
            f"the config field 'task_specific_matrix_type' is {shown(form)}: the library itself "
            f"fails on any but 'singular_values'"
        )
    modules = tensors.get(LORAS, {})
    scalars.check_modules(modules)
    return _ParsedMtlLora(
        scalars,
        tuple(_module(path, inside, scalars, config) for path, inside in modules.items()),
    )


KIND = MethodKind("mtl_lora", PAGE, Method(_matches, claims_all(LORAS), _parse))


def _module(
    path: str,
    tensors: Mapping[str, Tensor],
    scalars: LoraScalars,
    config: Mapping[str, object],
) -> _Module:
    if is_fused(path):
        raise AdapterUnsupported(
            f"{shown(path)} is fused, on which the library's own MTL-LoRA fails: train LoRA there"
        )
    count = positive_int("n_up_projection", config.get("n_up_projection", 1))
    sharpness = finite_number("weights_sharpness", config.get("weights_sharpness", 0.05))
    if count > MAX_PROJECTIONS or abs(sharpness) < 1e-6:
        raise AdapterUnsupported(
            f"n_up_projection is {count}, of at most {MAX_PROJECTIONS}, and weights_sharpness "
            f"{sharpness}"
        )
    check_names(path, tensors, ("lora_A", "lora_B", "task_specific.values", "weights"))
    a, b = tensors["lora_A"], tensors["lora_B"]
    if a.dim() != 2 or b.dim() != 3 or 0 in b.shape:
        raise AdapterCorrupt(f"{shown(path)} has a lora_A {list(a.shape)}, lora_B {list(b.shape)}")
    check_shape(path, "lora_A", a, scalars.rank, a.shape[1])
    check_shape(path, "lora_B", b, count, b.shape[1], scalars.rank)
    check_shape(path, "task_specific.values", tensors["task_specific.values"], scalars.rank)
    check_shape(path, "weights", tensors["weights"], count)
    # The library's exp(w / sharpness) / sum overflows where softmax does not.
    shares = (tensors["weights"].float() / sharpness).softmax(0)
    return _Module(path, a, b, tensors["task_specific.values"], shares)
