"""Adapters as AdapterHub (``adapters`` 1.x) saves them: the envelope that all of its methods share.

``adapter_config.json`` is ``{config, hidden_size, model_class, model_name, model_type, name,
version}``. The adapter's name stands inside the names of the tensors::

    model.layers.0.output_adapters.adapters.<name>.adapter_up.weight
    ^ path                         ^ container     ^ tensor

A *method* (bottleneck, LoRA, prefix tuning, ...) claims some of these containers and paths. One
adapter has one method, or several in a union; each module is claimed by exactly one. Beside
the adapter, a model with a language-model head saves that head as well: it is served where it
differs from the base's.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..files import ADAPTERHUB, INTERFACE_FILE
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import BaseLayout
from ..primitives.layer import Bottleneck
from ..primitives.lowered import KVPrefix, Part
from ..primitives.primitive import Primitive
from ..scope import EveryPosition
from .adapterhub_tensors import Tensors, sort_tensors
from .binding import mismatch
from .config_fields import FieldRules
from .overrides import merge, override_primitives
from .peft_patterns import MAX_PATH_LENGTH
from .peft_tensors import require_float

_ENVELOPE = FieldRules(
    implemented=frozenset({"config", "name", "model_type", "version", "hidden_size"}),
    harmless={
        "model_class": "the modules are named by the tensors; a class with a head of its own saves "
        "that head, which is looked at",
        "model_name": "a note on the base",
        "config_id": "a hash of the configuration",
        "type": "of adapter-transformers: a note on what it was trained for",
        "label2id": "names of classes",
    },
    refused={},
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What is said of the whole adapter.

    Attributes:
        name: As it stands in the names of the tensors.
        model_type: Hugging Face ``model_type`` of its base.
        model_class: Class of the model that it was trained in, empty where none is told.
        hidden_size: Of its base, None where none is told.
        stem: Path of the base model within one with a head.
        alpha_is_rank: LoRA of a version that ignored alpha (see ``_alpha_is_rank``).
        options: Those of ``deltamux.json``.
    """

    name: str
    model_type: str
    model_class: str
    hidden_size: int | None
    stem: str
    alpha_is_rank: bool
    options: Mapping[str, object] = field(default_factory=dict)


_INTERFACE: Mapping[str, str | None] = {
    "attn_k_proj": "k_proj",
    "attn_o_proj": "o_proj",
    "attn_q_proj": "q_proj",
    "attn_v_proj": "v_proj",
    "layer_intermediate_proj": "mlp.up_proj",
    "layer_output_proj": "mlp.down_proj",
    "layer_pre_ffn": "post_attention_layernorm",
    "layer_pre_self_attn": "input_layernorm",
    "layer_self_attn": "self_attn",
    "model_embeddings": "embed_tokens",
    "model_layers": "layers",
}
"""Where the library's map of Qwen2 and Qwen3 finds modules; everything else is null."""

NOT_CAUSAL = (
    "its gate is a mean over the whole sequence, later tokens included, so that no token could be "
    "generated before the last is known: train without"
)
"""Why ``use_gating`` is refused."""

Config = Mapping[str, object]
"""A method's configuration."""


class ParsedMethod(Protocol):
    """One method of an adapter, configuration and tensors in agreement."""

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """See ``kind.ParsedAdapter``."""
        ...

    def lower(self, base: Base) -> Lowered:
        """See ``kind.ParsedAdapter``; a part for every position comes first."""
        ...


@dataclass(frozen=True, slots=True)
class Method:
    """A way of adaptation that AdapterHub knows.

    Attributes:
        matches: Whether a configuration is of this method.
        claims: Whether a configuration of this method puts tensors into the container at the path.
        parse: Checks the configuration and the tensors that it claims. Raises AdapterUnsupported
            for a field, a value or a tensor that is not served, AdapterCorrupt where configuration
            and tensors contradict each other.
    """

    matches: Callable[[Config], bool]
    claims: Callable[[Config, str, str], bool]
    parse: Callable[[Config, Envelope, Tensors], ParsedMethod]


@dataclass(frozen=True, slots=True)
class MethodKind:
    """The kind of adapters that have one method; see ``kind.AdapterKind``."""

    name: str
    page: KindPage
    method: Method
    library: str = ADAPTERHUB

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether the configuration inside the envelope is of the method."""
        inner = config.get("config")
        return isinstance(inner, dict) and self.method.matches(inner)

    def parse(self, checkpoint: Checkpoint) -> "ParsedAdapterHub":
        """Check envelope, configuration and tensors."""
        return parse_methods(checkpoint, [(self.method, inner_config(checkpoint.config))])


@dataclass(frozen=True, slots=True)
class ParsedAdapterHub:
    """An adapter of one or more methods, and perhaps a head."""

    envelope: Envelope
    methods: tuple[ParsedMethod, ...]
    head: Mapping[str, Tensor]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What the methods lower to; without a base, nobody knows whether the head is another."""
        return tuple(shape for method in self.methods for shape in method.shapes)

    def lower(self, base: Base) -> Lowered:
        """The methods' parts, those for every position as one; see ``kind.ParsedAdapter``."""
        self._check_base(base.layout)
        lowered = [method.lower(base) for method in self.methods]
        everywhere: list[Primitive] = list(_head_primitives(base, self.head))
        others: list[Part] = []
        for each in lowered:
            first, *rest = each.parts or (Part(EveryPosition(), ()),)
            if isinstance(first.scope, EveryPosition):
                everywhere += first.primitives
            else:
                rest.insert(0, first)
            others += rest
        merged = merge(everywhere)
        _require_apart(merged, others)
        main = (Part(EveryPosition(), merged),) if merged else ()
        return Lowered((*main, *others), _one_prefix(lowered))

    def _check_base(self, layout: BaseLayout) -> None:
        if self.envelope.model_type != layout.model_type:
            raise mismatch(layout, f"its model_type is {shown(self.envelope.model_type)}")
        hidden = self.envelope.hidden_size
        if hidden is not None and hidden != layout.hidden_size:
            raise mismatch(layout, f"its hidden_size is {hidden}")


def claims_all(*containers: str) -> Callable[[Config, str, str], bool]:
    """``Method.claims`` of whoever has all there is in these containers."""

    def claims(_config: Config, container: str, _path: str) -> bool:
        return container in containers

    return claims


def parse_methods(
    checkpoint: Checkpoint, methods: Sequence[tuple[Method, Config]]
) -> ParsedAdapterHub:
    """Check the envelope, give each method its tensors, and parse them.

    Raises:
        AdapterUnsupported: As ``Method.parse``; or a tensor that no method claims.
        AdapterCorrupt: As ``Method.parse``; or a tensor that two claim.
    """
    envelope = read_envelope(checkpoint)
    tensors = sort_tensors(checkpoint.tensors, envelope.name, envelope.stem)
    shares = _shares(methods, tensors)
    parsed = [
        method.parse(config, envelope, share)
        for (method, config), share in zip(methods, shares, strict=True)
    ]
    return ParsedAdapterHub(envelope, tuple(parsed), _head_tensors(checkpoint.head))


def inner_config(config: Mapping[str, object]) -> Config:
    """The method's configuration inside the envelope's, or AdapterCorrupt."""
    inner = config.get("config")
    if not isinstance(inner, dict):
        raise AdapterCorrupt(f"the config field 'config' is {shown(inner)}, not an object")
    return inner


def read_envelope(checkpoint: Checkpoint) -> Envelope:
    """The fields around the method's configuration.

    Raises:
        AdapterUnsupported: A field that is not known.
        AdapterCorrupt: A field of another type.
    """
    config = checkpoint.config
    _ENVELOPE.check(config)
    _check_interface(checkpoint.interface)
    model_type = _text("model_type", config.get("model_type"))
    name = _text("name", config.get("name"))
    if "." in name:
        raise AdapterCorrupt(f"the config field 'name' is {shown(name)}, and holds a dot")
    hidden = config.get("hidden_size")
    if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int)):
        raise AdapterCorrupt(f"the config field 'hidden_size' is {shown(hidden)}, not a count")
    return Envelope(
        name=name,
        model_type=model_type,
        model_class=str(config.get("model_class") or ""),
        hidden_size=hidden,
        stem="transformer" if model_type == "gpt2" else "model",
        # The loader looks at the architecture of the whole, so that a union is left alone.
        alpha_is_rank=_alpha_is_rank(_text("version", config.get("version")))
        and inner_config(config).get("architecture") == "lora",
        options=checkpoint.options,
    )


def _check_interface(interface: Mapping[str, object] | None) -> None:
    """Models that the library does not know by itself come with a map of their modules.

    Another map puts the same tensors into other places.
    """
    if interface is None:
        return
    places = interface.get("interface")
    if not isinstance(places, dict):
        raise AdapterCorrupt(f"{INTERFACE_FILE} has no object 'interface'")
    for name, place in places.items():
        if name != "adapter_methods" and place != _INTERFACE.get(name):
            raise AdapterUnsupported(
                f"{INTERFACE_FILE} says {shown(name)}: {shown(place)}, and the library's own map "
                f"of Qwen2 and Qwen3 {shown(_INTERFACE.get(name))}"
            )


def _shares(methods: Sequence[tuple[Method, Config]], tensors: Tensors) -> list[Tensors]:
    """The tensors that each method claims."""
    shares: list[dict[str, dict[str, Mapping[str, Tensor]]]] = [{} for _ in methods]
    for container, modules in tensors.items():
        for path, inside in modules.items():
            owners = [
                share
                for share, (method, config) in zip(shares, methods, strict=True)
                if method.claims(config, container, path)
            ]
            if not owners:
                raise AdapterUnsupported(
                    f"the {container} of {shown(path)} are not served: the configuration puts none "
                    f"there"
                )
            if len(owners) > 1:
                raise AdapterCorrupt(
                    f"the {container} of {shown(path)} belong to two configurations of the union"
                )
            owners[0].setdefault(container, {})[path] = inside
    return list[Tensors](shares)


def _head_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for name, tensor in tensors.items():
        require_float(name, tensor)
        if name != "lm_head.weight":
            raise AdapterUnsupported(
                f"the head's tensor {shown(name)} is not served: only the language-model head of "
                f"a Hugging Face class is; save the adapter with_head=False if it is not needed"
            )
    return tensors


def _head_primitives(base: Base, head: Mapping[str, Tensor]) -> tuple[Primitive, ...]:
    """The saved head in the place of the base's, as ``load_adapter(with_head=True)`` puts it.

    A tied base has one tensor for head and embedding: the library's loader copies into it, so both
    change. A head equal to the base's costs nothing.
    """
    layout = base.layout
    if not head:
        return ()
    weight = head["lm_head.weight"]
    places = [layout.head_path, *([layout.token_embedding.path] if layout.tied_head else [])]
    return override_primitives(base, {f"{path}.weight": weight for path in places})


def _require_apart(merged: Iterable[Primitive], others: Iterable[Part]) -> None:
    """Refuse a ReFT that reads what a bottleneck gives: both would read the base's output."""
    rows = {each.row for each in merged if isinstance(each, Bottleneck)}
    for part in others:
        for each in part.primitives:
            if not isinstance(part.scope, EveryPosition) and each.row in rows:
                raise AdapterUnsupported(
                    f"{shown(each.path)} has a ReFT behind a bottleneck, and both would read what "
                    f"the base computed: train with one of them in a layer"
                )


def _one_prefix(lowered: Iterable[Lowered]) -> KVPrefix | None:
    found = [each.prefix for each in lowered if each.prefix is not None]
    if len(found) > 1:
        raise AdapterUnsupported("the union holds two prefixes, which the library refuses too")
    return found[0] if found else None


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_PATH_LENGTH:
        raise AdapterCorrupt(f"the config field {name!r} is {shown(value)}, not a short text")
    return value


def _alpha_is_rank(version: str) -> bool:
    """Whether the library's loader sets LoRA's alpha to r: adapters before 1.1.0 trained so.

    Versions without the prefix are of adapter-transformers, which the loader leaves alone.
    """
    if not version.startswith("adapters."):
        return False
    match = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(.{0,32})", version)
    if match is None:
        raise AdapterUnsupported(f"the config field 'version' is {shown(version)}, not a release")
    release = tuple(int(number or 0) for number in match.groups()[:3])
    before = match[4].lstrip(".-_").startswith(("dev", "a", "b", "rc", "c"))
    return release < (1, 1, 0) or (release == (1, 1, 0) and before)
