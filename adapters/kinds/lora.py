"""LoRA (arXiv:2106.09685) as PEFT stores and computes it.

For a module with base output y, in PEFT 0.21.2 and with its dropout off,

    y += s ((x Aᵀ) Bᵀ + c),   s = alpha / r, or alpha / sqrt(r) with use_rslora (arXiv:2312.03732)

with A (r, in) ``lora_A.weight``, B (out, r) ``lora_B.weight`` and c (out,) ``lora_B.bias``, for
``nn.Linear`` and GPT-2's ``Conv1D`` alike. Which modules are adapted is read from the tensors'
names, never from ``target_modules``, which PEFT also resolves before it saves; the configuration
gives the scalars, and a pattern of ``rank_pattern`` or ``alpha_pattern`` overrides r or alpha for
the modules whose path, or dotted end of it, it matches in full: the first in the file's order.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..config_fields import PEFT_HARMLESS, FieldRules, finite_number, flag, positive_int
from ..errors import AdapterCorrupt, AdapterMismatch, AdapterUnsupported, shown
from ..kind import PrimitiveShape
from ..layout import BaseLayout, LinearTarget
from ..peft_patterns import MAX_PATH_LENGTH, Patterns
from ..primitives import LowRank, OutputBias, Primitive

MAX_RANK = 4096

_TENSOR_NAME = re.compile(
    rf"base_model\.model\.(.{{1,{MAX_PATH_LENGTH}}})\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)"
)

_CHANGES_THE_SUM = "it computes something else than LoRA: train without it"

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
        }
    ),
    harmless={
        **PEFT_HARMLESS,
        "target_modules": "resolved into the tensors' names",
        "exclude_modules": "resolved into the tensors' names",
        "layers_to_transform": "resolved into the tensors' names",
        "layers_pattern": "resolved into the tensors' names",
        "lora_dropout": "off outside training",
        "fan_in_fan_out": "A and B are stored the same for Linear and Conv1D",
        "megatron_core": "read only with megatron_config",
        "loftq_config": "read only with init_lora_weights='loftq'",
        "eva_config": "initialization only",
        "corda_config": "read only with init_lora_weights='corda'",
        "lora_ga_config": "read only with init_lora_weights='lora_ga'",
        "qalora_group_size": "read only with use_qalora",
        "runtime_config": "where DoRA's initialization computes; PEFT ignores it in a file",
        "merge_weights": "of PEFT < 0.3: whether evaluation merged the same sum into the base",
    },
    refused={
        "modules_to_save": "whole modules are replaced: train with LoRA on those modules",
        "trainable_token_indices": "embedding rows are replaced: train without new tokens",
        "use_dora": _CHANGES_THE_SUM,
        "use_qalora": _CHANGES_THE_SUM,
        "use_bdlora": _CHANGES_THE_SUM,
        "kasa_config": "it changes the base weights: train with plain LoRA",
        "velora_config": "its extra tensors are not read: train with plain LoRA",
        "monteclora_config": "its extra tensors are not read: train with plain LoRA",
        "arrow_config": "it routes between adapters: load them one by one",
        "alora_invocation_tokens": "it starts in the middle of a prompt: train with plain LoRA",
        "layer_replication": "it repeats layers, and the base is shared: train without it",
        "target_parameters": "it adapts parameters, not modules: train with target_modules",
        "ensure_weight_tying": "it ties embedding and head: train with target_modules only",
        "megatron_config": "it was trained on Megatron's modules: export it to Hugging Face's",
    },
)

# Starting values of A and B that leave the base as it is: what was trained is plain LoRA.
_PLAIN_INIT = ("gaussian", "eva", "orthogonal", "mica")

# Why a tensor that is neither A, B nor c is refused: the first fragment found in its name.
_OTHER_TENSORS = (
    (".lora_embedding_", "LoRA on an embedding is not served"),
    (".lora_magnitude_vector", "it belongs to DoRA, which is not served"),
    (
        ".base_layer.weight",
        "it is a copy of a base weight, and nothing here can tell whether it still equals it: save "
        "again with save_pretrained(..., save_embedding_layers=False)",
    ),
    (".trainable_tokens_delta", "it replaces rows of the embedding, which is not served"),
    (".bias", "it replaces a bias of the base: train with bias='none'"),
)


@dataclass(frozen=True, slots=True)
class _Scalars:
    """What the configuration says about each module."""

    r: int
    alpha: float
    use_rslora: bool
    has_bias: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns

    @classmethod
    def read(cls, config: Mapping[str, object], num_modules: int) -> "_Scalars":
        return cls(
            r=positive_int("r", config.get("r", 8)),
            alpha=finite_number("lora_alpha", config.get("lora_alpha", 8)),
            use_rslora=flag("use_rslora", config.get("use_rslora", False)),
            has_bias=flag("lora_bias", config.get("lora_bias", False)),
            rank_pattern=Patterns.read(config, "rank_pattern", num_modules),
            alpha_pattern=Patterns.read(config, "alpha_pattern", num_modules),
        )

    def rank(self, path: str) -> int:
        """PEFT's r of the module."""
        pattern = self.rank_pattern.first_match(path)
        if pattern is None:
            return self.r
        return positive_int(f"rank_pattern[{pattern}]", self.rank_pattern.values[pattern])

    def scale(self, path: str, rank: int) -> float:
        """PEFT's scaling of the module."""
        pattern = self.alpha_pattern.first_match(path)
        alpha = self.alpha
        if pattern is not None:
            alpha = finite_number(f"alpha_pattern[{pattern}]", self.alpha_pattern.values[pattern])
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class _Module:
    """LoRA on one module, as stored: a (r, in), b (out, r), c (out,) or None."""

    path: str
    a: Tensor
    b: Tensor
    c: Tensor | None
    scale: float

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield PrimitiveShape(
            LowRank.__name__, self.path, self.a.shape[0], self.a.numel() + self.b.numel()
        )
        if self.c is not None:
            yield PrimitiveShape(OutputBias.__name__, self.path, 0, self.c.numel())

    def lower(self, target: LinearTarget, dtype: torch.dtype) -> Iterator[Primitive]:
        """The scale goes into B and c in float32, before the one cast."""
        yield LowRank(target, _cast(self.path, self.a, dtype), self._scaled(self.b.T, dtype))
        if self.c is not None:
            yield OutputBias(target, self._scaled(self.c, dtype))

    def _scaled(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return _cast(self.path, tensor.float() * self.scale, dtype)


@dataclass(frozen=True, slots=True)
class ParsedLora:
    """A LoRA adapter whose configuration and tensors agree."""

    modules: tuple[_Module, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What each module lowers to."""
        return tuple(shape for module in self.modules for shape in module.shapes)

    def lower(self, layout: BaseLayout, dtype: torch.dtype) -> tuple[Primitive, ...]:
        """Bind every module to the base's target of its path; see ``kind.ParsedAdapter``."""
        bound = [(self._target(module, layout), module) for module in self.modules]
        bound.sort(key=lambda pair: pair[0].index)
        return tuple(
            primitive for target, module in bound for primitive in module.lower(target, dtype)
        )

    def _target(self, module: _Module, layout: BaseLayout) -> LinearTarget:
        target = layout.targets.get(module.path)
        if target is None:
            raise self._mismatch(layout, f"{shown(module.path)} is not a linear module of it")
        ours, theirs = (target.in_features, target.out_features), _features(module)
        if ours != theirs:
            raise self._mismatch(
                layout,
                f"{module.path} maps {theirs[0]} to {theirs[1]} there, {ours[0]} to {ours[1]} here",
            )
        return target

    def _mismatch(self, layout: BaseLayout, why: str) -> AdapterMismatch:
        numbers = [int(n) for m in self.modules for n in re.findall(r"\.(\d{1,6})\.", m.path)]
        layers = f"at least {max(numbers) + 1} layers" if numbers else "an unknown number of layers"
        widths = ", ".join(str(width) for width in sorted({m.a.shape[1] for m in self.modules})[:4])
        return AdapterMismatch(
            f"the adapter was made for another base: {why}. It expects {layers} and modules that "
            f"read {widths} features; this base ({layout.model_type}) has {layout.num_layers} "
            f"layers and hidden size {layout.hidden_size}"
        )


@dataclass(frozen=True, slots=True)
class PeftLora:
    """PEFT's ``peft_type: LORA``."""

    name: str = "lora"
    library: str = "peft"

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether the configuration says LORA."""
        return config.get("peft_type") == "LORA"

    def parse(self, checkpoint: Checkpoint) -> ParsedLora:
        """Check every field and every tensor; see ``kind.AdapterKind``."""
        RULES.check(checkpoint.config)
        _check_init(checkpoint.config.get("init_lora_weights", True))
        _check_bias(checkpoint.config.get("bias", "none"))
        parts = _by_module(checkpoint.tensors)
        if not parts:
            raise AdapterCorrupt("the weight file holds no LoRA tensor at all")
        scalars = _Scalars.read(checkpoint.config, len(parts))
        return ParsedLora(tuple(_module(path, parts[path], scalars) for path in parts))


KIND = PeftLora()


def _check_init(value: object) -> None:
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN_INIT):
        return
    raise AdapterUnsupported(
        f"the config field 'init_lora_weights' is {shown(value)}, which trains against changed "
        f"base weights: convert the adapter with PEFT's "
        f"save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )


def _check_bias(value: object) -> None:
    """Any of PEFT's values goes where no bias was stored, as for a base that has none."""
    if value not in ("none", "all", "lora_only"):
        raise AdapterUnsupported(f"the config field 'bias' has the unknown value {shown(value)}")


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path -> {"lora_A.weight": ..., ...}."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            reason = next(
                (reason for fragment, reason in _OTHER_TENSORS if fragment in name),
                "its name is not one that PEFT gives a LoRA tensor",
            )
            raise AdapterUnsupported(f"the tensor {shown(name)} is not served: {reason}")
        if not tensor.is_floating_point():
            raise AdapterUnsupported(f"the tensor {shown(name)} is {tensor.dtype}, not a float")
        modules.setdefault(match[1], {})[match[2]] = tensor
    return modules


def _module(path: str, parts: Mapping[str, Tensor], scalars: _Scalars) -> _Module:
    a, b, c = (parts.get(part) for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
    if a is None or b is None:
        missing = "lora_A" if a is None else "lora_B"
        raise AdapterCorrupt(
            f"{shown(path)} has no {missing}.weight: the weight file is incomplete"
        )
    if (c is not None) is not scalars.has_bias:
        raise AdapterCorrupt(
            f"the config field 'lora_bias' is {scalars.has_bias}, and {shown(path)} "
            f"{'has no' if c is None else 'has a'} lora_B.bias"
        )
    rank = scalars.rank(path)
    _check_shapes(path, rank, a, b, c)
    return _Module(path, a, b, c, scalars.scale(path, rank))


def _check_shapes(path: str, rank: int, a: Tensor, b: Tensor, c: Tensor | None) -> None:
    if a.dim() != 2 or b.dim() != 2:
        raise AdapterUnsupported(f"{shown(path)} is not a linear module: lora_A is {list(a.shape)}")
    if not a.shape[0] == b.shape[1] == rank or (c is not None and c.shape != b.shape[:1]):
        raise AdapterCorrupt(
            f"{shown(path)} has rank {rank} by the configuration, and lora_A is {list(a.shape)}, "
            f"lora_B {list(b.shape)}, its bias {None if c is None else list(c.shape)}"
        )
    if rank > MAX_RANK:
        raise AdapterUnsupported(f"{shown(path)} has rank {rank}, more than {MAX_RANK}")


def _features(module: _Module) -> tuple[int, int]:
    return module.a.shape[1], module.b.shape[0]


def _cast(path: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    if not bool(cast.isfinite().all()):
        raise AdapterUnsupported(
            f"{shown(path)} overflows in {dtype}: serve with --dtype bfloat16 or float32"
        )
    return cast
