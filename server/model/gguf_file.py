"""Converts a GGUF file to a Hugging Face folder, so that everything else knows one format only.

llama.cpp's converter renames tensors and, for its ``llama`` architecture, interleaves the two
rotary halves of every q and k head; both are undone here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from .checkpoint import INDEX
from .errors import ModelCorrupt, ModelUnsupported
from .gguf_config import read_gguf_config

SHARD_BYTES = 2 << 30
_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Kept as they are. All else becomes float32: half precision cannot hold scale * integer + minimum.
_KEPT_DTYPES: Mapping[GGMLQuantizationType, torch.dtype] = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def convert_gguf(source: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``config.json``, tokenizer files and dequantised safetensors of ``source``.

    Args:
        source: A GGUF file.
        folder: Exists and is empty.
        shard_bytes: A shard is closed once it is this large, which bounds the memory needed.

    Raises:
        ModelUnsupported: The architecture, a metadata key or a tensor is not served; names it.
        ModelCorrupt: The file is truncated, not GGUF, or its tokenizer cannot be built.
    """
    try:
        reader = GGUFReader(source)
    # the reader lets through whatever numpy raises at the first field that does not fit
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ModelCorrupt(f"not a readable GGUF file: {error}") from error
    architecture, config = read_gguf_config(reader)
    _write_json(folder / "config.json", config)
    ends = {key: value for key, value in config.items() if key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", ends)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = _tensors(reader, heads if architecture.interleaved_rotary else {})
    _write_shards(tensors, folder, shard_bytes)
    _write_tokenizer(source, folder)


def _tensors(
    reader: GGUFReader, interleaved_heads: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and dequantised values, one at a time."""
    for stored in reader.tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored.name)
        if match is None or match[2] not in _NAMES:
            raise ModelUnsupported(
                f"GGUF tensor {stored.name} is not known and could change what the model computes; "
                "use the model's safetensors checkpoint"
            )
        layer, part, kind = match.groups()
        prefix = "" if layer is None else f"model.layers.{layer}."
        tensor = _dequantised(stored)
        if part in interleaved_heads:
            tensor = _halves_apart(tensor, interleaved_heads[part])
        yield f"{prefix}{_NAMES[part]}.{kind}", tensor


def _dequantised(stored: ReaderTensor) -> Tensor:
    try:
        values = numpy.array(dequantize(stored.data, stored.tensor_type), dtype=numpy.float32)
    except NotImplementedError as error:
        raise ModelUnsupported(
            f"GGUF tensor {stored.name}: {stored.tensor_type.name} cannot be dequantised"
        ) from error
    return torch.from_numpy(values).to(_KEPT_DTYPES.get(stored.tensor_type, torch.float32))


def _halves_apart(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (u0, v0, u1, v1, ...) to (u0, u1, ..., v0, v1, ...)."""
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    file, size = 1, 0
    for name, tensor in tensors:
        shard[name] = tensor
        weight_map[name] = _shard_name(file)
        size += tensor.nbytes
        if size >= shard_bytes:
            save_file(shard, folder / _shard_name(file), metadata={"format": "pt"})
            shard, file, size = {}, file + 1, 0
    if shard:
        save_file(shard, folder / _shard_name(file), metadata={"format": "pt"})
    _write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _write_tokenizer(source: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
        )
    # transformers lets through whatever its converters raise at metadata they do not expect
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise ModelCorrupt(f"the tokenizer cannot be built: {error!r}") from error
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
