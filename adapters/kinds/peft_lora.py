"""LoRA (arXiv:2106.09685) as PEFT stores and computes it, with its variants.

For a module with base output y, in PEFT 0.21.2 and with its dropout off,

    y += s ((x Aᵀ) Bᵀ + c),   s = alpha / r, or alpha / sqrt(r) with use_rslora (arXiv:2312.03732)

with A (r, in) ``lora_A.weight``, B (out, r) ``lora_B.weight`` and c (out,) ``lora_B.bias``, for
``nn.Linear`` and GPT-2's ``Conv1D`` alike. Which modules are adapted is read from the tensors'
names, never from ``target_modules``, which PEFT also resolves before it saves; the configuration
gives the scalars, and a pattern of ``rank_pattern`` or ``alpha_pattern`` overrides r or alpha for
the modules whose path, or dotted end of it, it matches in full: the first in the file's order.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.linear_adapter import PeftKind, require_shape
from ..formats.lora_adapter import LoraAdapter, require_apart
from ..formats.lora_config import RULES, LoraScalars, Variant, invocation_tokens
from ..formats.lora_modules import EmbeddingLora, LinearLora, LoraModule
from ..formats.lora_storage import Storage
from ..formats.peft_saved import SavedTensors
from ..formats.peft_tensors import by_module, required
from ..kind import KindPage

_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE, _DIAGONAL = "lora_magnitude_vector", "lora_diag"
_NAMES = (_A, _B, _BIAS, _EMBEDDING_A, _EMBEDDING_B, _MAGNITUDE, _DIAGONAL)

_OF_TRAINING = {
    Variant.VELORA: ".lora_velora_embed",
    Variant.MONTECLORA: ".lora_monteclora_sampler.",
}
"""Tensors that PEFT saves and reads in training only."""

_OTHERS = (
    (".lora_arrow", "it routes between adapters: load them one by one"),
    (".lora_velora", "the config field velora_config is null"),
    (".lora_monteclora", "the config field monteclora_config is null"),
    (".base_layer.lora_", "several parameters of one module are adapted, as of experts"),
)


def _read(checkpoint: Checkpoint) -> LoraAdapter:
    config = checkpoint.config
    own = {name: tensor for name, tensor in checkpoint.tensors.items() if _is_own(name)}
    if not own:
        raise AdapterCorrupt("the weight file holds no LoRA tensor at all")
    parts = by_module(own, _NAMES, _OTHERS)
    scalars = LoraScalars.read(config, len(parts))
    beside = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name not in own and not _is_of_training(name, scalars.variant)
    }
    saved = SavedTensors.read(config, beside, parts, _OTHERS)
    require_apart(parts, saved)
    # PEFT saves the weight of an adapted head as training left it: nothing is to be taken out.
    of_copies = replace(scalars, removed=None)
    modules = tuple(
        _module(path, parts[path], of_copies if f"{path}.weight" in saved.copies else scalars)
        for path in parts
    )
    return LoraAdapter(modules, saved, invocation_tokens(config))


def _is_own(name: str) -> bool:
    return name.endswith(tuple(f".{suffix}" for suffix in _NAMES))


def _is_of_training(name: str, variant: Variant) -> bool:
    return variant in _OF_TRAINING and _OF_TRAINING[variant] in name


def _module(path: str, parts: Mapping[str, Tensor], scalars: LoraScalars) -> LoraModule:
    if "base_layer" in path.split("."):
        raise AdapterUnsupported(f"the tensors of {shown(path)} are not served: {_OTHERS[-1][1]}")
    rank = scalars.rank(path)
    is_embedding = _EMBEDDING_A in parts or _EMBEDDING_B in parts
    build = _embedding if is_embedding else _linear
    return build(path, rank, parts, scalars)


def _linear(path: str, rank: int, parts: Mapping[str, Tensor], scalars: LoraScalars) -> LinearLora:
    a, b = required(path, parts, _A, _B)
    storage = _storage(path, scalars)
    storage.require(path, rank, a, b)
    has_bias = scalars.has_bias and storage.blocks_of_b == 1
    return LinearLora(
        path=path,
        rank=rank,
        a=a,
        b=b,
        scale=scalars.scale(path, rank),
        storage=storage,
        bias=_vector(path, parts, _BIAS, b.shape[0], "lora_bias", has_bias),
        diagonal=_vector(path, parts, _DIAGONAL, rank, *_stated(scalars, Variant.KASA)),
        magnitude=_vector(path, parts, _MAGNITUDE, b.shape[0], *_stated(scalars, Variant.DORA)),
        removed=scalars.removed,
    )


def _embedding(
    path: str, rank: int, parts: Mapping[str, Tensor], scalars: LoraScalars
) -> EmbeddingLora:
    scalars.require_embedding(path)
    a, b = required(path, parts, _EMBEDDING_A, _EMBEDDING_B)
    require_shape(path, _EMBEDDING_A, a, rank, None)
    require_shape(path, _EMBEDDING_B, b, None, rank)
    for name in (_A, _B, _BIAS, _DIAGONAL):
        if name in parts:
            raise AdapterCorrupt(f"{shown(path)} has a {name} and a {_EMBEDDING_A}")
    magnitude = _vector(path, parts, _MAGNITUDE, b.shape[0], *_stated(scalars, Variant.DORA))
    return EmbeddingLora(path, rank, a, b, scalars.scale(path, rank), magnitude)


def _storage(path: str, scalars: LoraScalars) -> Storage:
    blocks = scalars.blocks
    if blocks is None:
        of_parameter = scalars.is_parameter(path)
        return Storage(group_size=scalars.group_size, of_parameter=of_parameter)
    return Storage(
        blocks_of_a=blocks.count if blocks.splits_a(path) else 1,
        blocks_of_b=blocks.count if blocks.splits_b(path) else 1,
    )


def _stated(scalars: LoraScalars, variant: Variant) -> tuple[str, bool]:
    """The field that turns a variant on, and whether it does."""
    return variant.value, scalars.variant is variant


def _vector(
    path: str, parts: Mapping[str, Tensor], name: str, size: int, field: str, stated: bool
) -> Tensor | None:
    """The tensor (size,) that must be there if the field is on, and must not if it is off."""
    tensor = parts.get(name)
    if (tensor is not None) is not stated:
        raise AdapterCorrupt(
            f"the config field {field!r} is {'on' if stated else 'off'}, and {shown(path)} has "
            f"{'no' if stated else 'a'} {name}"
        )
    if tensor is not None:
        require_shape(path, name, tensor, size)
    return tensor


KIND = PeftKind(
    name="lora",
    page=KindPage(
        title="LoRA (arXiv:2106.09685), rsLoRA, DoRA, activated LoRA, PiSSA, OLoRA, KaSA, BD-LoRA, "
        "QA-LoRA",
        family="reparameterisation",
        files="lora_A.weight (r, in) and lora_B.weight (out, r) of each module, of an embedding "
        "lora_embedding_A (r, tokens) and lora_embedding_B (hidden, r); lora_B.bias (out) with "
        "lora_bias; lora_magnitude_vector with use_dora; lora_diag (r) with kasa_config. Beside "
        "them whole tensors of modules_to_save, biases of bias='all' and 'lora_only', "
        "token_adapter.trainable_tokens_delta with trainable_token_indices, and copies of the "
        "base's embedding and head. Fields r, lora_alpha, use_rslora, rank_pattern, alpha_pattern",
        equation="y += s (B A x + c), s = alpha / r, or alpha / sqrt(r) with use_rslora. DoRA: "
        "y = b + g * (W x + s B A x), g = m / |W + s B A| by rows, computed once at load from the "
        "served W. PiSSA, OLoRA and KaSA as they were trained, not converted: minus the part of W "
        "that training took out, as r further ranks. aLoRA: from the last occurrence of its "
        "invocation tokens in the prompt on, and nowhere without one. BD-LoRA's and QA-LoRA's "
        "factors are written out. Replaced tensors, biases and rows apply everywhere",
        primitives=(
            "Affine",
            "EmbeddingAffine",
            "Dense",
            "NormOverride",
            "EmbeddingRows",
            "OutputRows",
        ),
        memory="r (in + out) a module, 2 r (in + out) for PiSSA, OLoRA and KaSA, out more with "
        "DoRA or lora_bias; replaced tensors as they are",
        limits="Refused: initializations that cannot be repeated beside a shared base "
        "(pissa_niter, CorDA, LoRA-GA, LoftQ; PEFT can convert most), layer replication, Arrow, "
        "Megatron, adapted stacks of experts, a vocabulary of another size, and DoRA, PiSSA, "
        "OLoRA, KaSA or aLoRA on a module whose own weight is in the file as well. A weight is "
        "decomposed in float64 at load for PiSSA and KaSA, which takes seconds for a large one. "
        "A QLoRA adapter is an ordinary one, here beside the base as it is served",
    ),
    rules=RULES,
    read=_read,
)
