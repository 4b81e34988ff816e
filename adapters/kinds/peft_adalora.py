"""AdaLoRA (arXiv:2303.10512) as PEFT stores and computes it.

    y += s (x (E * A)ᵀ) Bᵀ,   s = alpha / (init_r + 1e-5)

with A (r, in) ``lora_A``, E (r, 1) ``lora_E`` and B (out, r) ``lora_B``. Training prunes a module
from init_r to r ranks, which ``rank_pattern`` lists and the tensors no longer hold; the scale stays
that of init_r. An alpha of 0 or less stands for r.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.config_fields import FieldRules, finite_number
from ..formats.linear_adapter import PeftKind, bounded_rank
from ..formats.lora_adapter import LoraAdapter, require_apart
from ..formats.lora_config import LORA_HARMLESS, LORA_REFUSED
from ..formats.lora_modules import LinearLora
from ..formats.lora_storage import Storage
from ..formats.peft_saved import SavedTensors
from ..formats.peft_tensors import by_module, required
from ..kind import KindPage

_NAMES = ("lora_A", "lora_B", "lora_E")
_EPSILON = 1e-5
"""PEFT adds it to the rank that it divides by."""

_NOT_READ = "PEFT's AdaLoRA does not read it"
_NO_VARIANT = "PEFT's AdaLoRA has no such variant: set it to null"


def _read(checkpoint: Checkpoint) -> LoraAdapter:
    config = checkpoint.config
    own = {name: t for name, t in checkpoint.tensors.items() if _is_own(name)}
    beside = {name: t for name, t in checkpoint.tensors.items() if name not in own}
    parts = by_module(own, _NAMES)
    saved = SavedTensors.read(config, beside, parts)
    require_apart(parts, saved)
    modules = (module for path in parts for module in _modules(path, parts[path], config))
    return LoraAdapter(tuple(modules), saved)


def _is_own(name: str) -> bool:
    return name.endswith(tuple(f".{suffix}" for suffix in _NAMES))


def _modules(
    path: str, parts: Mapping[str, Tensor], config: Mapping[str, object]
) -> Iterator[LinearLora]:
    """The module, or none if it was pruned to rank 0."""
    a, b, e = required(path, parts, *_NAMES)
    initial = bounded_rank("init_r", config.get("init_r", 12))
    rank = _rank(path, initial, config.get("rank_pattern"))
    if not (a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank and e.shape == (rank, 1)):
        raise AdapterCorrupt(
            f"{shown(path)} has rank {rank} by the configuration, and lora_A is {list(a.shape)}, "
            f"lora_B {list(b.shape)}, lora_E {list(e.shape)}"
        )
    alpha = finite_number("lora_alpha", config.get("lora_alpha", 8))
    scale = (alpha if alpha > 0 else rank) / (initial + _EPSILON)
    if rank:
        yield LinearLora(path, rank, a, b, scale, Storage(), diagonal=e[:, 0])


def _rank(path: str, initial: int, pattern: object) -> int:
    """Ranks that the mask of the module's ``lora_E`` leaves."""
    if pattern is not None and not isinstance(pattern, dict):
        raise AdapterCorrupt(f"the config field 'rank_pattern' is {shown(pattern)}, not an object")
    mask = None if pattern is None else pattern.get(f"{path}.lora_E")
    if mask is None:
        return initial
    is_mask = isinstance(mask, list) and all(isinstance(each, bool) for each in mask)
    if not is_mask or len(mask) != initial:
        raise AdapterCorrupt(
            f"the config field 'rank_pattern' has {shown(mask)} for {shown(path)}, not {initial} "
            f"truth values"
        )
    return sum(mask)


KIND = PeftKind(
    name="adalora",
    page=KindPage(
        title="AdaLoRA (arXiv:2303.10512)",
        family="reparameterisation",
        files="lora_A (r, in), lora_B (out, r) and lora_E (r, 1) of each module, r being what "
        "rank_pattern leaves of init_r; beside them what a LoRA adapter may have; fields init_r, "
        "lora_alpha, rank_pattern",
        equation="y += alpha / (init_r + 1e-5) B diag(E) A x; an alpha of 0 or less stands for r",
        primitives=("Affine", "Dense", "NormOverride", "EmbeddingRows", "OutputRows"),
        memory="r (in + out) a module; replaced tensors as they are",
        limits="As for LoRA; the variants of LoRA's configuration are refused, which PEFT's "
        "AdaLoRA has not",
    ),
    rules=FieldRules(
        implemented=frozenset(
            {
                "init_r",
                "lora_alpha",
                "rank_pattern",
                "bias",
                "modules_to_save",
                "trainable_token_indices",
            }
        ),
        harmless={
            **LORA_HARMLESS,
            "r": _NOT_READ,
            "use_rslora": _NOT_READ,
            "alpha_pattern": _NOT_READ,
            "lora_bias": _NOT_READ,
            "init_lora_weights": _NOT_READ,
            "target_r": "of the schedule that prunes; what it left is in the tensors",
            "tinit": "of that schedule",
            "tfinal": "of that schedule",
            "deltaT": "of that schedule",
            "total_step": "of that schedule",
            "beta1": "of that schedule",
            "beta2": "of that schedule",
            "orth_reg_weight": "of the training loss",
        },
        refused={
            **LORA_REFUSED,
            "use_dora": _NO_VARIANT,
            "use_qalora": _NO_VARIANT,
            "use_bdlora": _NO_VARIANT,
            "kasa_config": _NO_VARIANT,
            "velora_config": _NO_VARIANT,
            "monteclora_config": _NO_VARIANT,
            "alora_invocation_tokens": _NO_VARIANT,
            "loftq_config": _NO_VARIANT,
            "target_parameters": _NO_VARIANT,
        },
    ),
    read=_read,
)
