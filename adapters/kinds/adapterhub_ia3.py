"""IA3 (arXiv:2205.05638) as AdapterHub stores and computes it.

    y = alpha l * (W x + b)

with l ``lora_B`` (out, 1), on the output of every module, also where PEFT scales the input. On
GPT-2's fused query, key and value l has a third for each of the matrices it adapts; the others are
multiplied by alpha alone, as in the library.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod, claims_all
from ..formats.adapterhub_lora import LoraScalars, columns, is_dora, is_fused, is_lora
from ..formats.adapterhub_tensors import LORAS, Tensors, check_names
from ..formats.binding import cast, mismatch, named_target
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine
from ..primitives.lowered import Part
from ..scope import EveryPosition

PAGE = KindPage(
    title="IA3 (arXiv:2205.05638)",
    family="addition",
    files="adapter_config.json with architecture lora and composition_mode scale; per module "
    "loras.<name>.lora_B (out, 1)",
    equation="y = alpha * l * (W x + b)",
    primitives=("Affine",),
    memory="out a module",
    limits="use_gating (its gate is a mean over the whole sequence); r other than 1, and use_dora "
    "(the library refuses both)",
)


@dataclass(frozen=True, slots=True)
class _ParsedIA3:
    scalars: LoraScalars
    vectors: Mapping[str, Tensor]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return tuple(
            PrimitiveShape(Affine.__name__, path, 0, vector.shape[0])
            for path, vector in self.vectors.items()
        )

    def lower(self, base: Base) -> Lowered:
        self.scalars.check_layers(base.layout, self.vectors)
        bound = [self._lower(path, vector, base) for path, vector in self.vectors.items()]
        bound.sort(key=lambda each: each.row)
        return Lowered((Part(EveryPosition(), tuple(bound)),))

    def _lower(self, path: str, vector: Tensor, base: Base) -> Affine:
        target = named_target(base.layout, path)
        starts = columns(target, self.scalars.matrices) if is_fused(path) else [0]
        scale = self._scale(path, vector[:, 0].float(), target, starts, base)
        return Affine(target, scale=cast(path, scale * self.scalars.alpha, base.dtype))

    def _scale(
        self, path: str, vector: Tensor, target: LinearTarget, starts: list[int], base: Base
    ) -> Tensor:
        width = target.out_features // 3 if is_fused(path) else target.out_features
        if len(vector) != len(starts) * width:
            raise mismatch(
                base.layout, f"{shown(path)} has {len(vector)} features there, {width} here"
            )
        scale = torch.ones(target.out_features)
        for index, start in enumerate(starts):
            scale[start : start + width] = vector[index * width : (index + 1) * width]
        return scale


def _matches(config: Config) -> bool:
    return is_lora(config) and config.get("composition_mode") == "scale"


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    scalars = LoraScalars.read(config, envelope)
    if is_dora(config) or scalars.rank != 1:
        raise AdapterUnsupported(
            f"composition_mode 'scale' goes with r 1 and without use_dora, and r is "
            f"{scalars.rank}: the library refuses it too"
        )
    modules = tensors.get(LORAS, {})
    scalars.check_modules(modules)
    for path, inside in modules.items():
        check_names(path, inside, ("lora_B",))
        shape = inside["lora_B"].shape
        if len(shape) != 2 or shape[1] != 1 or shape[0] == 0:
            raise AdapterCorrupt(f"lora_B of {shown(path)} is {list(shape)}, not a column")
    return _ParsedIA3(scalars, {path: inside["lora_B"] for path, inside in modules.items()})


KIND = MethodKind("ia3", PAGE, Method(_matches, claims_all(LORAS), _parse))
