"""Writes a tiny Hugging Face checkpoint as GGUF, the way llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import numpy
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    model: Path,
    path: Path,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **metadata: object,
) -> Path:
    """Write ``model`` to ``path``, matrices quantised, with more architecture ``metadata``."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, config["model_type"])
    _add_sizes(writer, config)
    for key, value in metadata.items():
        full_key = f"{config['model_type']}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(full_key, value)
        else:
            writer.add_uint32(full_key, value)
    _add_tokenizer(writer, model, config)
    for name, tensor in load_file(model / "model.safetensors").items():
        _add_tensor(writer, name, tensor.numpy(), config, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    types = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([types[index in special] for _, index in vocab])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template((model / "chat_template.jinja").read_text())


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: numpy.ndarray,
    config: dict,
    quantization: gguf.GGMLQuantizationType,
) -> None:
    path, kind = name.rsplit(".", 1)
    parts = path.split(".")
    prefix = f"blk.{parts[2]}." if parts[:2] == ["model", "layers"] else ""
    part = NAMES[".".join(parts[3:]) if prefix else path]
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
    if config["model_type"] == "llama" and heads:
        halves = values.reshape(config[heads], 2, -1, *values.shape[1:])
        values = numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    stored_as = quantization if values.ndim > 1 else gguf.GGMLQuantizationType.F32
    data = gguf.quantize(values, stored_as)
    writer.add_tensor(f"{prefix}{part}.{kind}", data, raw_dtype=stored_as)
