"""The configuration of PEFT's LoRA: every field judged, and what the others' values mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from .config_fields import PEFT_HARMLESS, FieldRules, finite_number, flag, name_list, positive_int
from .linear_adapter import bounded_rank
from .peft_patterns import Patterns
from .weight_parts import KASA, OLORA, PISSA, RemovedPart

MAX_INVOCATION_TOKENS = 256
"""A prompt is searched for them while the engine waits."""

LORA_HARMLESS: Mapping[str, str] = {
    **PEFT_HARMLESS,
    "target_modules": "resolved into the tensors' names",
    "exclude_modules": "resolved into the tensors' names",
    "layers_to_transform": "resolved into the tensors' names",
    "layers_pattern": "resolved into the tensors' names",
    "lora_dropout": "off outside training",
    "fan_in_fan_out": "A and B are stored the same for Linear and Conv1D",
    "megatron_core": "read only with megatron_config",
    "eva_config": "initialization only",
    "corda_config": "read only with init_lora_weights='corda'",
    "lora_ga_config": "read only with init_lora_weights='lora_ga'",
    "qalora_group_size": "read only with use_qalora",
    "runtime_config": "where DoRA's initialization computes; PEFT ignores it in a file",
    "ensure_weight_tying": "what it ties is stored for each module",
}
"""Fields of LoRA's configuration, and AdaLoRA's, that cannot change an answer by themselves."""

LORA_REFUSED: Mapping[str, str] = {
    "arrow_config": "it routes between adapters: load them one by one",
    "layer_replication": "it repeats layers, and the base is shared: train without it",
    "megatron_config": "it was trained on Megatron's modules: export it to Hugging Face's",
}
"""Fields that no shared base can be served with."""

RULES = FieldRules(
    implemented=frozenset(
        {
            "r",
            "lora_alpha",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "lora_bias",
            "bias",
            "init_lora_weights",
            "use_dora",
            "use_qalora",
            "use_bdlora",
            "kasa_config",
            "velora_config",
            "monteclora_config",
            "alora_invocation_tokens",
            "modules_to_save",
            "trainable_token_indices",
            "target_parameters",
        }
    ),
    harmless={
        **LORA_HARMLESS,
        "loftq_config": "read only with init_lora_weights='loftq'",
        "merge_weights": "of PEFT < 0.3: whether evaluation merged the same sum into the base",
    },
    refused=LORA_REFUSED,
)
"""Of ``peft_type: LORA``."""

# Starting values of A and B that leave the base as it is: what was trained is plain LoRA.
_PLAIN_INIT = ("gaussian", "eva", "orthogonal", "mica")

_NOT_REPEATABLE = (
    ("pissa_niter", "is drawn at random"),
    ("corda", "depends on the data it was made with"),
    ("lora_ga", "depends on the data it was made with"),
    ("loftq", "is a base quantized in a way of its own"),
)


class Variant(Enum):
    """What PEFT computes in the place of plain LoRA; it allows one at a time."""

    PLAIN = "lora"
    DORA = "use_dora"
    ALORA = "alora_invocation_tokens"
    VELORA = "velora_config"
    MONTECLORA = "monteclora_config"
    BLOCKS = "use_bdlora"
    KASA = "kasa_config"
    QALORA = "use_qalora"


def _of_training(*names: str) -> FieldRules:
    return FieldRules(frozenset(), dict.fromkeys(names, "read in training only"), {})


_NESTED_RULES: Mapping[Variant, FieldRules] = {
    Variant.BLOCKS: FieldRules(
        implemented=frozenset({"target_modules_bd_a", "target_modules_bd_b", "nblocks"}),
        harmless={"match_strict": "whether training refuses modules without blocks"},
        refused={},
    ),
    Variant.KASA: _of_training("beta", "gamma"),
    Variant.VELORA: _of_training("num_groups", "scale", "init_type"),
    Variant.MONTECLORA: _of_training(
        "num_samples",
        "use_entropy",
        "dirichlet_prior",
        "sample_scaler",
        "kl_loss_weight",
        "buffer_size",
    ),
}
_ON_EMBEDDINGS = (Variant.PLAIN, Variant.DORA)
_GROUPS = "qalora_group_size"


@dataclass(frozen=True, slots=True)
class Blocks:
    """BD-LoRA: which modules store A or B by the blocks of its diagonal.

    Attributes:
        a: Parts of the paths of modules whose A is block-diagonal.
        b: Parts of the paths of modules whose B is.
        count: Blocks of each.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    count: int

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "Blocks":
        """The field ``use_bdlora``, an object.

        Raises:
            AdapterCorrupt: A value that PEFT does not write.
            AdapterUnsupported: Another field, or more names than it can take.
        """
        fields = _nested(config, Variant.BLOCKS)
        return cls(
            a=name_list("target_modules_bd_a", fields.get("target_modules_bd_a")),
            b=name_list("target_modules_bd_b", fields.get("target_modules_bd_b")),
            count=positive_int("nblocks", fields.get("nblocks", 1)),
        )

    def splits_a(self, path: str) -> bool:
        """Whether A of the module is block-diagonal."""
        return any(part in path for part in self.a)

    def splits_b(self, path: str) -> bool:
        """Whether B of the module is; it has no bias then.

        Raises:
            AdapterCorrupt: A of the module is block-diagonal as well.
        """
        splits = any(part in path for part in self.b)
        if splits and self.splits_a(path):
            raise AdapterCorrupt(f"'use_bdlora' splits both A and B of {shown(path)}")
        return splits


@dataclass(frozen=True, slots=True)
class LoraScalars:
    """What the configuration says about each module.

    Attributes:
        r: Rank without a pattern.
        alpha: Alpha without a pattern.
        use_rslora: Whether the scale is alpha / sqrt(r) (arXiv:2312.03732).
        has_bias: Whether B has a bias.
        rank_pattern: Ranks of some modules.
        alpha_pattern: Alphas of some modules.
        parameters: Ends of the names of parameters that were adapted by themselves.
        variant: What is computed.
        blocks: Of BD-LoRA.
        group_size: Inputs that QA-LoRA takes together.
        removed: The part of the base's weight that training took out.
    """

    r: int
    alpha: float
    use_rslora: bool
    has_bias: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    parameters: frozenset[str]
    variant: Variant
    blocks: Blocks | None
    group_size: int
    removed: RemovedPart | None

    @classmethod
    def read(cls, config: Mapping[str, object], num_modules: int) -> "LoraScalars":
        """Read and check the fields.

        Args:
            config: Of ``peft_type: LORA``.
            num_modules: Modules that patterns are going to be matched with.

        Raises:
            AdapterCorrupt: A value that PEFT does not write.
            AdapterUnsupported: One that is not served.
        """
        variant = _variant(config)
        return cls(
            r=positive_int("r", config.get("r", 8)),
            alpha=finite_number("lora_alpha", config.get("lora_alpha", 8)),
            use_rslora=flag("use_rslora", config.get("use_rslora", False)),
            has_bias=flag("lora_bias", config.get("lora_bias", False)),
            rank_pattern=Patterns.read(config, "rank_pattern", num_modules),
            alpha_pattern=Patterns.read(config, "alpha_pattern", num_modules),
            parameters=_parameters(config, variant),
            variant=variant,
            blocks=Blocks.read(config) if variant is Variant.BLOCKS else None,
            group_size=_group_size(config) if variant is Variant.QALORA else 1,
            removed=_removed(config, variant),
        )

    def is_parameter(self, path: str) -> bool:
        """Whether the module's weight was adapted as a parameter, as it is stored."""
        if not self.parameters:
            return False
        name = f"{path}.weight"
        ends = (name[start:] for start in (0, *_after_dots(name)))
        return any(end in self.parameters for end in ends)

    def rank(self, path: str) -> int:
        """PEFT's r of the module.

        Raises:
            AdapterCorrupt: It is not a positive integer.
            AdapterUnsupported: It exceeds MAX_RANK.
        """
        pattern = self.rank_pattern.first_match(self._key(path))
        if pattern is None:
            return bounded_rank("r", self.r)
        return bounded_rank(f"rank_pattern[{pattern}]", self.rank_pattern.values[pattern])

    def scale(self, path: str, rank: int) -> float:
        """PEFT's scaling of the module.

        Raises:
            AdapterCorrupt: It is not a sane number.
        """
        pattern = self.alpha_pattern.first_match(self._key(path))
        alpha = self.alpha
        if pattern is not None:
            alpha = finite_number(f"alpha_pattern[{pattern}]", self.alpha_pattern.values[pattern])
        if self.removed is PISSA and alpha <= 0:
            raise AdapterCorrupt(f"PiSSA needs an alpha above 0, and {shown(path)} has {alpha}")
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def require_embedding(self, path: str) -> None:
        """Raise AdapterUnsupported if PEFT has no such variant for embeddings."""
        if self.variant not in _ON_EMBEDDINGS or self.has_bias:
            field = "lora_bias" if self.has_bias else self.variant.value
            raise AdapterUnsupported(
                f"{shown(path)} is an embedding, for which PEFT has no {field}: train without it"
            )

    def _key(self, path: str) -> str:
        return f"{path}.weight" if self.is_parameter(path) else path


def invocation_tokens(config: Mapping[str, object]) -> tuple[int, ...]:
    """aLoRA's ``alora_invocation_tokens``, empty where it is off.

    Raises:
        AdapterCorrupt: They are not token ids.
        AdapterUnsupported: There are more than MAX_INVOCATION_TOKENS.
    """
    name = Variant.ALORA.value
    value = config.get(name) or []
    if not isinstance(value, list) or not all(type(id_) is int and id_ >= 0 for id_ in value):
        raise AdapterCorrupt(f"the config field {name!r} is {shown(value)}, not a list of tokens")
    if len(value) > MAX_INVOCATION_TOKENS:
        raise AdapterUnsupported(
            f"the config field {name!r} has {len(value)} tokens, more than {MAX_INVOCATION_TOKENS}"
        )
    return tuple(value)


def _variant(config: Mapping[str, object]) -> Variant:
    on = [each for each in Variant if _is_on(config, each)]
    if len(on) > 1:
        names = " and ".join(each.value for each in on)
        raise AdapterUnsupported(f"the config fields {names} are set, and PEFT combines none")
    return on[0] if on else Variant.PLAIN


def _is_on(config: Mapping[str, object], variant: Variant) -> bool:
    value = config.get(variant.value)
    if variant is Variant.ALORA:
        return bool(invocation_tokens(config))
    if variant is Variant.PLAIN or value is None or value is False:
        return False
    if variant in (Variant.DORA, Variant.QALORA):
        return flag(variant.value, value)
    return _nested(config, variant) is not None


def _nested(config: Mapping[str, object], variant: Variant) -> Mapping[str, object]:
    fields = config[variant.value]
    if not isinstance(fields, dict):
        raise AdapterCorrupt(f"the config field {variant.value!r} is {shown(fields)}, no object")
    _NESTED_RULES[variant].check(fields)
    return fields


def _group_size(config: Mapping[str, object]) -> int:
    size = positive_int(_GROUPS, config.get(_GROUPS, 16))
    if size == 1:
        raise AdapterUnsupported(
            f"the config field {_GROUPS!r} is 1: nothing tells whether PEFT grouped the inputs"
        )
    return size


def _parameters(config: Mapping[str, object], variant: Variant) -> frozenset[str]:
    """The field ``target_parameters``: only a module's ``weight`` is a matrix that is served."""
    name = "target_parameters"
    value = name_list(name, config.get(name))
    for each in value:
        if each.rpartition(".")[2] != "weight":
            raise AdapterUnsupported(
                f"the config field {name!r} holds {shown(each)}, and only the weights of modules "
                f"are served, no stacks of experts"
            )
    if value and variant is not Variant.PLAIN:
        raise AdapterUnsupported(
            f"the config fields {name} and {variant.value} are set, and PEFT does not combine them"
        )
    return frozenset(value)


def _removed(config: Mapping[str, object], variant: Variant) -> RemovedPart | None:
    part = _removed_at_start(config.get("init_lora_weights", True))
    if part is not None and variant is Variant.KASA:
        raise AdapterUnsupported(
            "the config fields kasa_config and init_lora_weights both change the base's weights"
        )
    if part is not None and config.get("target_parameters"):
        raise AdapterUnsupported(
            "the config fields target_parameters and init_lora_weights: convert the adapter with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return KASA if variant is Variant.KASA else part


def _removed_at_start(value: object) -> RemovedPart | None:
    """What the initialization ``init_lora_weights`` takes out of the base's weights."""
    name = value.lower() if isinstance(value, str) else ""
    if isinstance(value, bool) or name in _PLAIN_INIT:
        return None
    if name == "pissa":
        return PISSA
    if name == "olora":
        return OLORA
    reason = next((why for start, why in _NOT_REPEATABLE if name.startswith(start)), "is not known")
    raise AdapterUnsupported(
        f"the config field 'init_lora_weights' is {shown(value)}: the adapter was trained beside "
        f"changed base weights, and what changed them {reason}. Convert it with PEFT's "
        f"save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )


def _after_dots(name: str) -> list[int]:
    return [position + 1 for position, character in enumerate(name) if character == "."]
