"""Unions of AdapterHub's methods (``ConfigUnion``): Mix-and-Match (arXiv:2110.04366) and others.

Each configuration of ``configs`` is what it would be alone, and its tensors are those that it would
have alone. Mix-and-Match is prefix tuning with a parallel bottleneck.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..files import ADAPTERHUB, OPTIONS_FILE
from ..formats.adapterhub import Method, ParsedAdapterHub, inner_config, parse_methods
from ..kind import KindPage
from . import (
    adapterhub_bottleneck,
    adapterhub_compacter,
    adapterhub_dora,
    adapterhub_ia3,
    adapterhub_lora,
    adapterhub_mtl_lora,
    adapterhub_prefix_tuning,
    adapterhub_prompt_tuning,
    adapterhub_reft,
    adapterhub_vera,
)

MAX_CONFIGS = 16

_REFT = adapterhub_reft.KIND.method
_METHODS: Sequence[Method] = (
    adapterhub_bottleneck.KIND.method,
    adapterhub_compacter.KIND.method,
    adapterhub_dora.KIND.method,
    adapterhub_ia3.KIND.method,
    adapterhub_lora.KIND.method,
    adapterhub_mtl_lora.KIND.method,
    adapterhub_prefix_tuning.KIND.method,
    adapterhub_prompt_tuning.KIND.method,
    _REFT,
    adapterhub_vera.KIND.method,
)

PAGE = KindPage(
    title="Unions: Mix-and-Match (arXiv:2110.04366) and any other",
    family="addition",
    files="adapter_config.json with architecture union and configs, a list of configurations; the "
    "tensors of all of them",
    equation="That of each of its methods",
    primitives=("Affine", "Bottleneck", "EmbeddingRows", "KVPrefix"),
    memory="That of its methods together",
    limits="Those of its methods: UniPELT (arXiv:2110.07577) is one of gated methods, and refused "
    "as they are; a ReFT and a bottleneck behind the MLP of the same layer; a union in a union",
    options=adapterhub_reft.OPTIONS,
)


@dataclass(frozen=True, slots=True)
class AdapterHubUnion:
    """AdapterHub's ``architecture: union``; see ``kind.AdapterKind``."""

    name: str = "union"
    library: str = ADAPTERHUB
    page: KindPage = PAGE

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether the configuration says so."""
        inner = config.get("config")
        return isinstance(inner, dict) and inner.get("architecture") == "union"

    def parse(self, checkpoint: Checkpoint) -> ParsedAdapterHub:
        """Find the method of each configuration, and parse each with its own tensors."""
        union = inner_config(checkpoint.config)
        for name in union:
            if name not in ("architecture", "configs"):
                raise AdapterUnsupported(f"the config field {shown(name)} of a union is not known")
        configs = union.get("configs")
        if not isinstance(configs, list) or not 0 < len(configs) <= MAX_CONFIGS:
            raise AdapterCorrupt(
                f"the config field 'configs' is {shown(configs)}, not a short list"
            )
        methods = [(_method(each), each) for each in configs]
        if checkpoint.options and not any(method is _REFT for method, _ in methods):
            raise AdapterUnsupported(
                f"{OPTIONS_FILE} holds {shown(list(checkpoint.options))}, and the union has no ReFT"
            )
        return parse_methods(checkpoint, methods)


KIND = AdapterHubUnion()


def _method(config: object) -> Method:
    if isinstance(config, dict):
        for method in _METHODS:
            if method.matches(config):
                return method
    raise AdapterUnsupported(f"the configuration {shown(config)} in a union is not served")
