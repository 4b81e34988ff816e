"""Prefix tuning (arXiv:2101.00190), which is also P-tuning v2, as PEFT stores and computes it.

``prompt_embeddings`` (P, 2 layers kv_heads head_dim) holds for each of P virtual tokens its key and
value of layer 0, then of layer 1, and so on. They stand in the cache as they are, the keys not
rotated, and every token sees all of them; token i has position P + i. Of a projection (an MLP,
``prefix_projection``) PEFT saves the output.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt
from ..formats.binding import cast, mismatch
from ..formats.config_fields import positive_int
from ..formats.linear_adapter import PeftKind
from ..formats.overrides import override_shapes
from ..formats.soft_prompt import (
    EMBEDDINGS,
    Prompt,
    parts_of,
    prompt_rules,
    replaced_primitives,
    require_room,
)
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import BaseLayout
from ..primitives.lowered import KVPrefix

_APPLIED = "of the projection, which PEFT applies before it saves"


@dataclass(frozen=True, slots=True)
class _Heads:
    """What the configuration says of the base that the prefix was made for."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers of one virtual token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "_Heads":
        layers, heads, width = (
            positive_int(name, config.get(name))
            for name in ("num_layers", "num_attention_heads", "token_dim")
        )
        if width % heads:
            raise AdapterCorrupt(
                f"the config field 'token_dim' is {width}, no multiple of 'num_attention_heads', "
                f"which is {heads}"
            )
        return cls(layers, heads, width // heads)

    @classmethod
    def of(cls, layout: BaseLayout) -> "_Heads":
        return cls(layout.num_layers, layout.num_kv_heads, layout.head_dim)

    def __str__(self) -> str:
        return f"{self.layers} layers with {self.kv_heads} key heads of {self.head_dim}"


@dataclass(frozen=True, slots=True)
class _ParsedPrefix:
    rows: Tensor
    heads: _Heads
    replaced: Mapping[str, Tensor]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        prefix = PrimitiveShape(KVPrefix.__name__, "", 0, self.rows.numel())
        return (prefix, *override_shapes(self.replaced))

    def lower(self, base: Base) -> Lowered:
        ours, theirs = _Heads.of(base.layout), self.heads
        if theirs != ours:
            raise mismatch(base.layout, f"the prefix is for {theirs}, and this has {ours}")
        length = len(self.rows)
        require_room(base.layout, length)
        rows = cast(EMBEDDINGS, self.rows, base.dtype)
        # (length, layers, key or value, heads, head_dim) -> (layers, heads, length, head_dim)
        split = rows.view(length, ours.layers, 2, ours.kv_heads, ours.head_dim)
        keys, values = split.permute(2, 1, 3, 0, 4)
        prefix = KVPrefix(keys.contiguous(), values.contiguous(), position_offset=length)
        return Lowered(parts_of(replaced_primitives(base, self.replaced)), prefix)


def _read(checkpoint: Checkpoint) -> _ParsedPrefix:
    prompt = Prompt.read(checkpoint)
    heads = _Heads.read(checkpoint.config)
    if prompt.rows.shape[1] != heads.width:
        raise AdapterCorrupt(
            f"{EMBEDDINGS} is {list(prompt.rows.shape)}, and {heads} take {heads.width} a row"
        )
    return _ParsedPrefix(prompt.rows, heads, prompt.replaced)


KIND = PeftKind(
    name="prefix_tuning",
    page=KindPage(
        title="Prefix tuning (arXiv:2101.00190) and P-tuning v2 (arXiv:2110.07602)",
        family="addition",
        files="prompt_embeddings (P, 2 layers kv_heads head_dim), the projection's output where "
        "there was one; fields num_layers, num_attention_heads (those of keys), token_dim",
        equation="every layer's attention sees P more keys and values, the keys not rotated; token "
        "i has position P + i",
        primitives=("KVPrefix",),
        memory="2 layers kv_heads head_dim P numbers, in blocks of the KV cache that all requests "
        "share",
        limits="P is below the base's longest sequence. A prefix of more heads than the base has "
        "for keys, as old versions of PEFT made it, is refused, as by PEFT itself.",
    ),
    rules=prompt_rules(
        {
            "encoder_hidden_size": _APPLIED,
            "prefix_projection": _APPLIED,
            "init_weights": "initialization only",
        },
        ("num_layers", "num_attention_heads"),
    ),
    read=_read,
)
