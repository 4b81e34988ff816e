"""LLaMA-Adapter (adaption prompts, arXiv:2303.16199) as PEFT stores and computes it.

In the topmost layers, with p (P, hidden) ``adaption_prompt`` and g ``adaption_gate``,

    s = g softmax(q (W_k p)ᵀ / sqrt(head_dim)) (W_v p),

q rotated, the prompt's keys not, in a softmax of its own. Projections are the base's, with their
biases. Llama and Mistral add o_proj(s) to the attention's output, and with it the bias of o_proj
once more; GPT-2 adds s itself. Where s is added is the base's matter, see ``SideAttention``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.binding import cast, mismatch, named_target
from ..formats.config_fields import PEFT_HARMLESS, FieldRules, positive_int
from ..formats.linear_adapter import PeftKind, require_shape
from ..formats.overrides import merge
from ..formats.peft_tensors import by_module, required
from ..formats.soft_prompt import require_room
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import BaseLayout, LayerSite
from ..primitives.layer import SideAttention
from ..primitives.linear import Affine
from ..primitives.lowered import Part
from ..primitives.primitive import Primitive
from ..scope import EveryPosition

_PROMPT, _GATE = "adaption_prompt", "adaption_gate"
_FUSED = "gpt2"
_BASES = ("llama", "mistral", _FUSED)


@dataclass(frozen=True, slots=True)
class _Module:
    """One layer's prompt (length, hidden) and gate (1,)."""

    path: str
    prompt: Tensor
    gate: Tensor

    def lower(self, base: Base, layer: LayerSite) -> Iterator[Primitive]:
        layout = base.layout
        if self.prompt.shape[1] != layout.hidden_size:
            raise mismatch(layout, f"its prompts have {self.prompt.shape[1]} features")
        require_room(layout, len(self.prompt))
        keys, values = (
            _in_heads(layout, linear(self.prompt.float(), weight, bias))
            for weight, bias in _key_and_value(base, self.path)
        )
        yield SideAttention(
            layer,
            keys=cast(self.path, keys, base.dtype),
            values=cast(self.path, values * self.gate.float(), base.dtype),
        )
        if layout.model_type != _FUSED:
            out = named_target(layout, f"{self.path}.o_proj")
            bias = base.linear(out).bias
            if bias is not None:
                yield Affine(out, bias=bias)


def _key_and_value(base: Base, path: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of both projections, in float32; GPT-2 has them in one module with q's."""
    is_fused = base.layout.model_type == _FUSED
    for name in ("c_attn",) if is_fused else ("k_proj", "v_proj"):
        weight, bias = base.linear(named_target(base.layout, f"{path}.{name}"))
        count = 3 if is_fused else 1
        weights = weight.float().chunk(count)
        biases = [None] * count if bias is None else bias.float().chunk(count)
        # Of three, the first is q's.
        yield from list(zip(weights, biases, strict=True))[-2:]


def _in_heads(layout: BaseLayout, rows: Tensor) -> Tensor:
    """(length, kv_heads head_dim) -> (kv_heads, length, head_dim)"""
    return rows.view(len(rows), layout.num_kv_heads, layout.head_dim).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _ParsedPrompts:
    modules: tuple[_Module, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return tuple(
            PrimitiveShape(SideAttention.__name__, each.path, 0, each.prompt.numel())
            for each in self.modules
        )

    def lower(self, base: Base) -> Lowered:
        _require_family(base.layout)
        layers = {layer.attention_path: layer for layer in base.layout.layers}
        found: list[Primitive] = []
        for module in self.modules:
            if module.path not in layers:
                raise mismatch(base.layout, f"{shown(module.path)} is not an attention of it")
            found += module.lower(base, layers[module.path])
        return Lowered((Part(EveryPosition(), merge(found)),))


def _require_family(layout: BaseLayout) -> None:
    if layout.model_type not in _BASES:
        raise AdapterUnsupported(
            f"PEFT has adaption prompts for {', '.join(_BASES)}, and this base is "
            f"{layout.model_type}"
        )


def _read(checkpoint: Checkpoint) -> _ParsedPrompts:
    length = positive_int("adapter_len", checkpoint.config.get("adapter_len"))
    layers = positive_int("adapter_layers", checkpoint.config.get("adapter_layers"))
    found = by_module(checkpoint.tensors, (_PROMPT, _GATE))
    if len(found) != layers:
        raise AdapterCorrupt(
            f"the config field 'adapter_layers' is {layers}, and the file has prompts for "
            f"{len(found)}"
        )
    return _ParsedPrompts(tuple(_module(path, parts, length) for path, parts in found.items()))


def _module(path: str, parts: Mapping[str, Tensor], length: int) -> _Module:
    prompt, gate = required(path, parts, _PROMPT, _GATE)
    require_shape(path, _PROMPT, prompt, 1, length, None)
    require_shape(path, _GATE, gate, 1)
    return _Module(path, prompt[0], gate)


KIND = PeftKind(
    name="adaption_prompt",
    page=KindPage(
        title="LLaMA-Adapter: adaption prompts (arXiv:2303.16199)",
        family="addition",
        files="adaption_prompt (1, P, hidden) and adaption_gate (1,) of the attention of each of "
        "the topmost layers; fields adapter_len, adapter_layers",
        equation="attention += o_proj(s), s = g softmax(q (W_k p)ᵀ / sqrt(head_dim)) (W_v p), q "
        "rotated, the keys not; on GPT-2 attention += s",
        primitives=("SideAttention", "Affine"),
        memory="2 kv_heads head_dim P numbers a layer; hidden more where o_proj has a bias, which "
        "is added once more, as in PEFT",
        limits="Llama, Mistral and GPT-2, as in PEFT. P is below the base's longest sequence.",
    ),
    rules=FieldRules(
        implemented=frozenset({"adapter_len", "adapter_layers"}),
        harmless={**PEFT_HARMLESS, "target_modules": "resolved into the tensors' names"},
        refused={},
    ),
    read=_read,
)
