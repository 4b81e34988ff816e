"""From a GGUF file's metadata to the fields of ``config.json``.

Every key that describes the architecture is known here or refuses the file: a key passed over could
change the computation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFReader

from .errors import ModelCorrupt, ModelUnsupported


@dataclass(frozen=True, slots=True)
class GGUFArchitecture:
    """How one GGUF architecture is known to Hugging Face.

    Attributes:
        architecture: Class name.
        model_type: Its configuration.
        interleaved_rotary: Rotary halves of q and k heads are interleaved row by row.
    """

    architecture: str
    model_type: str
    interleaved_rotary: bool


ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture("LlamaForCausalLM", "llama", interleaved_rotary=True),
    "qwen2": GGUFArchitecture("Qwen2ForCausalLM", "qwen2", interleaved_rotary=False),
    "qwen3": GGUFArchitecture("Qwen3ForCausalLM", "qwen3", interleaved_rotary=False),
}
_REQUIRED: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}


def read_gguf_config(reader: GGUFReader) -> tuple[GGUFArchitecture, dict[str, Any]]:
    """The architecture and what its ``config.json`` says.

    Raises:
        ModelUnsupported: An architecture or a metadata key that is not served; names it.
        ModelCorrupt: A key that every model needs is missing.
    """
    name = _field(reader, "general.architecture")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ModelUnsupported(
            f"GGUF architecture {name!r} is not supported; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    sizes = _Metadata(reader, f"{name}.")
    config = {field: sizes.take(key) for key, field in _REQUIRED.items()}
    heads = config["num_attention_heads"]
    head_dim = sizes.take("attention.key_length", config["hidden_size"] // heads)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    vocab_size = int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0
    config |= {
        "architectures": [architecture.architecture],
        "model_type": architecture.model_type,
        "num_key_value_heads": sizes.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": sizes.take("rope.freq_base", 10000.0),
        },
    }
    sizes.expect("attention.value_length", head_dim)
    sizes.expect("rope.dimension_count", head_dim)
    sizes.expect("rope.scaling.type", "none")
    sizes.expect("vocab_size", vocab_size)
    sizes.check_all_taken()
    return architecture, config | _special_tokens(reader)


class _Metadata:
    """The keys below one prefix, each to be taken once."""

    def __init__(self, reader: GGUFReader, prefix: str) -> None:
        self._prefix = prefix
        self._values = {
            key.removeprefix(prefix): _field(reader, key)
            for key in reader.fields
            if key.startswith(prefix)
        }

    def take(self, key: str, default: Any = None) -> Any:
        value = self._values.pop(key, default)
        if value is None:
            raise ModelCorrupt(f"GGUF metadata key {self._prefix}{key} is missing")
        return value

    def expect(self, key: str, value: object) -> None:
        found = self._values.pop(key, value)
        if found != value:
            raise ModelUnsupported(
                f"GGUF metadata {self._prefix}{key}={found!r} is not supported; "
                f"supported: {value!r}"
            )

    def check_all_taken(self) -> None:
        for key, value in self._values.items():
            raise ModelUnsupported(
                f"GGUF metadata {self._prefix}{key}={value!r} is not known and could change what "
                "the model computes; use the model's safetensors checkpoint"
            )


def _special_tokens(reader: GGUFReader) -> dict[str, Any]:
    keys = {f"tokenizer.ggml.{key}_token_id": name for key, name in _SPECIAL_TOKENS.items()}
    return {
        f"{name}_token_id": _field(reader, key)
        for key, name in keys.items()
        if key in reader.fields
    }


def _field(reader: GGUFReader, key: str) -> Any:
    if key not in reader.fields:
        raise ModelCorrupt(f"GGUF metadata key {key} is missing")
    return reader.fields[key].contents()
