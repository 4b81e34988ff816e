"""LoRA (arXiv:2106.09685) as AdapterHub stores and computes it.

    y += s B A x,   s = alpha / r

with A (r, in) ``lora_A`` and B (out, r) ``lora_B``. On GPT-2's fused query, key and value A is
(n r, in) and B (n out / 3, r): block j of B times block j of A is added to the j-th adapted third.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod, claims_all
from ..formats.adapterhub_lora import (
    LoraScalars,
    columns,
    is_added,
    is_dora,
    is_fused,
    is_lora,
    is_vera,
)
from ..formats.adapterhub_tensors import LORAS, Tensors, check_names
from ..formats.binding import cast, linear_target
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine
from ..primitives.lowered import Part
from ..scope import EveryPosition

PAGE = KindPage(
    title="LoRA (arXiv:2106.09685)",
    family="reparameterisation",
    files="adapter_config.json with architecture lora and composition_mode add; per module "
    "loras.<name>.lora_A (r, in) and lora_B (out, r)",
    equation="y += alpha / r * B A x; files of adapters before 1.1.0: alpha = r",
    primitives=("Affine",),
    memory="r * (in + out) a module; on GPT-2's c_attn n r * (in + out) for n of q, k and v",
    limits="use_gating (its gate is a mean over the whole sequence); r above 4096",
)


@dataclass(frozen=True, slots=True)
class _Module:
    """One module as stored: a (n r, in), b (n out', r), n blocks."""

    path: str
    a: Tensor
    b: Tensor

    @property
    def out_features(self) -> int:
        """Rows of B, or all three thirds of a fused module."""
        return self.b.shape[0]


@dataclass(frozen=True, slots=True)
class _ParsedLora:
    scalars: LoraScalars
    modules: tuple[_Module, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return tuple(
            PrimitiveShape(
                Affine.__name__, each.path, each.a.shape[0], each.a.numel() + each.b.numel()
            )
            for each in self.modules
        )

    def lower(self, base: Base) -> Lowered:
        self.scalars.check_layers(base.layout, (each.path for each in self.modules))
        bound = [self._lower(each, base) for each in self.modules]
        bound.sort(key=lambda each: each.row)
        return Lowered((Part(EveryPosition(), tuple(bound)),))

    def _lower(self, module: _Module, base: Base) -> Affine:
        path, out_features = module.path, module.b.shape[0]
        if is_fused(path):
            out_features = 3 * out_features // self.scalars.blocks(path)
        target = linear_target(base.layout, path, module.a.shape[1], out_features)
        b = module.b.float() * self.scalars.scale
        placed = self._placed(b, target) if is_fused(path) else b.T
        return Affine(target, cast(path, module.a, base.dtype), cast(path, placed, base.dtype))

    def _placed(self, b: Tensor, target: LinearTarget) -> Tensor:
        """The blocks (out / 3, r) of B, each in the rows of its A and in its third: (n r, out)."""
        rank, third = self.scalars.rank, target.out_features // 3
        starts = columns(target, self.scalars.matrices)
        placed = torch.zeros(len(starts) * rank, target.out_features)
        for index, start in enumerate(starts):
            block = b[index * third : (index + 1) * third]
            placed[index * rank : (index + 1) * rank, start : start + third] = block.T
        return placed


def _matches(config: Config) -> bool:
    scaled = config.get("composition_mode") == "scale"
    dora = config.get("use_dora") not in (None, False)
    return is_lora(config) and not (scaled or dora or is_vera(config))


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    scalars = LoraScalars.read(config, envelope)
    if not is_added(config) or is_dora(config):
        raise AdapterUnsupported(
            f"the config field 'composition_mode' is {shown(config.get('composition_mode'))}, "
            f"which is neither 'add' nor 'scale'"
        )
    modules = tensors.get(LORAS, {})
    scalars.check_modules(modules)
    return _ParsedLora(
        scalars, tuple(_module(path, inside, scalars) for path, inside in modules.items())
    )


KIND = MethodKind("lora", PAGE, Method(_matches, claims_all(LORAS), _parse))


def _module(path: str, tensors: Mapping[str, Tensor], scalars: LoraScalars) -> _Module:
    check_names(path, tensors, ("lora_A", "lora_B"))
    a, b = tensors["lora_A"], tensors["lora_B"]
    blocks = scalars.blocks(path)
    fits = a.dim() == b.dim() == 2 and blocks > 0
    if not fits or (a.shape[0], b.shape[1]) != (blocks * scalars.rank, scalars.rank):
        raise AdapterCorrupt(
            f"{shown(path)} has {blocks} blocks of rank {scalars.rank} by the configuration, and "
            f"lora_A is {list(a.shape)}, lora_B {list(b.shape)}"
        )
    if b.shape[0] == 0 or b.shape[0] % blocks:
        raise AdapterCorrupt(f"{shown(path)} has a lora_B of {list(b.shape)} in {blocks} blocks")
    return _Module(path, a, b)
