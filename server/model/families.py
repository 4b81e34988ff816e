"""The architectures that are served: how each is configured and assembled.

A field of the transformers configuration that changes the computation is either read here or
required to have the value that leaves the computation as it is.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ...kernels.backend import Backend
from . import gpt2, llama
from .builder import ModelBuilder
from .config import ModelConfig
from .decoder import Decoder
from .errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from .rope import LinearScaling, Llama3Scaling, RopeConfig

_CONFIG_ERRORS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    OSError,
)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        model_type: Of its configuration: another's may hold fields that change the computation.
        configure: From transformers' configuration object.
        assemble: From the checkpoint's tensors.
        base_prefix: What tensor names of the decoder begin with.
    """

    model_type: str
    configure: Callable[[Any], ModelConfig]
    assemble: Callable[[ModelConfig, ModelBuilder, Backend], Decoder]
    base_prefix: str


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and sizes of the model in ``folder``.

    Raises:
        ModelNotFound: There is no ``config.json``.
        ModelCorrupt: It is unreadable or contradicts itself.
        ModelUnsupported: It names an architecture or a field's value that is not served.
    """
    architecture = _architecture(folder)
    family = FAMILIES.get(architecture)
    if family is None:
        raise ModelUnsupported(
            f"{folder}: architecture {architecture} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _require(config, "model_type", family.model_type)
        return family, family.configure(config)
    # transformers reports a bad field with whatever its validator or arithmetic raised
    except _CONFIG_ERRORS as error:
        raise ModelCorrupt(f"{folder}/config.json: {error!r}") from error


def _architecture(folder: Path) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder}: there is no config.json; is this a model folder?")
    try:
        architectures = json.loads(path.read_bytes())["architectures"]
        return str(architectures[0])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelCorrupt(f"{path}: names no architecture ({error!r})") from error


def _llama(config: Any) -> ModelConfig:
    return _like_llama(
        config,
        qkv_bias=config.attention_bias,
        attention_out_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def _mistral(config: Any) -> ModelConfig:
    return _like_llama(config, windows=(config.sliding_window,) * config.num_hidden_layers)


def _qwen2(config: Any) -> ModelConfig:
    return _like_llama(config, windows=_layer_windows(config), qkv_bias=True)


def _qwen3(config: Any) -> ModelConfig:
    return _like_llama(
        config,
        windows=_layer_windows(config),
        qkv_bias=config.attention_bias,
        attention_out_bias=config.attention_bias,
        qk_norm=True,
    )


def _gpt2(config: Any) -> ModelConfig:
    _require(config, "activation_function", "gelu_new", "gelu", "gelu_pytorch_tanh")
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    _require(config, "add_cross_attention", False)
    _require(config, "quantization_config", None)
    if config.n_embd % config.n_head:
        raise ModelCorrupt(
            f"config: n_embd {config.n_embd} is no multiple of n_head {config.n_head}"
        )
    return ModelConfig(
        model_type=config.model_type,
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        vocab_size=config.vocab_size,
        max_position=config.n_positions,
        norm_eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        windows=(None,) * config.n_layer,
        tie_word_embeddings=config.tie_word_embeddings,
        rope=None,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )


FAMILIES: Mapping[str, Family] = {
    "GPT2LMHeadModel": Family("gpt2", _gpt2, gpt2.assemble, "transformer."),
    "LlamaForCausalLM": Family("llama", _llama, llama.assemble, "model."),
    "MistralForCausalLM": Family("mistral", _mistral, llama.assemble, "model."),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2, llama.assemble, "model."),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3, llama.assemble, "model."),
}


def _like_llama(
    config: Any,
    *,
    windows: tuple[int | None, ...] | None = None,
    qkv_bias: bool = False,
    attention_out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    _require(config, "hidden_act", "silu")
    _require(config, "quantization_config", None)
    head_dim = getattr(config, "head_dim", None)
    return ModelConfig(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        windows=windows or (None,) * config.num_hidden_layers,
        tie_word_embeddings=config.tie_word_embeddings,
        rope=_rope(config),
        qkv_bias=qkv_bias,
        attention_out_bias=attention_out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def _layer_windows(config: Any) -> tuple[int | None, ...]:
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = sorted(set(config.layer_types) - set(windows))
    if unknown:
        raise _refusal(config, "layer_types", unknown[0], tuple(windows))
    return tuple(windows[layer_type] for layer_type in config.layer_types)


def _rope(config: Any) -> RopeConfig:
    """From ``rope_parameters``, to which transformers 5 also converts older ``rope_scaling``."""
    parameters: Mapping[str, Any] = config.rope_parameters
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        value = parameters["partial_rotary_factor"]
        raise _refusal(config, "partial_rotary_factor", value, (1.0,))
    return RopeConfig(float(parameters["rope_theta"]), _scaling(config, parameters))


def _scaling(config: Any, parameters: Mapping[str, Any]) -> LinearScaling | Llama3Scaling | None:
    match parameters["rope_type"]:
        case "default":
            return None
        case "linear":
            return LinearScaling(float(parameters["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_position=int(parameters["original_max_position_embeddings"]),
            )
        case other:
            supported = ("default", "linear", "llama3")
            raise _refusal(config, "rope_parameters.rope_type", other, supported)


def _require(config: Any, field: str, *supported: object) -> None:
    value = getattr(config, field, supported[0])
    if value not in supported:
        raise _refusal(config, field, value, supported)


def _refusal(
    config: Any, field: str, value: object, supported: tuple[object, ...]
) -> ModelUnsupported:
    return ModelUnsupported(
        f"{config.model_type} config: {field}={value!r} is not supported; "
        f"supported: {', '.join(map(repr, supported))}"
    )
