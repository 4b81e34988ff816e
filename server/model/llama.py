"""Llama and the families built like it: Mistral, SmolLM2, Qwen2, Qwen3."""

import torch

from ...kernels.backend import Backend
from .attention import Attention, QKNorm, SideAttention
from .blocks import RMSNorm
from .builder import ModelBuilder
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer
from .mlp import GatedMLP
from .rope import RotaryTable, rotary_table


def assemble(config: ModelConfig, builder: ModelBuilder, backend: Backend) -> Decoder:
    """RMS norms, rotary embedding and a gated MLP, under the module names of LlamaForCausalLM."""
    hidden = config.hidden_size
    tokens = builder.embedding("model.embed_tokens", config.vocab_size, hidden)
    layers = tuple(_layer(config, builder, backend, index) for index in range(config.num_layers))
    final_norm = _norm(config, builder, backend, "model.norm", hidden)
    head = builder.head(config, tokens.weight)
    return Decoder(
        config=config,
        layout=builder.finish(config),
        tokens=tokens,
        positions=None,
        layers=layers,
        final_norm=final_norm,
        head=head,
        rotary=_rotary(config, builder.device, backend),
    )


def _rotary(config: ModelConfig, device: torch.device, backend: Backend) -> RotaryTable | None:
    if config.rope is None:
        return None
    return rotary_table(config.rope, config.head_dim, config.max_position, device, backend)


def _layer(
    config: ModelConfig, builder: ModelBuilder, backend: Backend, index: int
) -> DecoderLayer:
    path, hidden = f"model.layers.{index}", config.hidden_size
    builder.layer(path, f"{path}.self_attn")
    return DecoderLayer(
        attention_norm=_norm(config, builder, backend, f"{path}.input_layernorm", hidden),
        attention=_attention(config, builder, backend, index),
        mlp_norm=_norm(config, builder, backend, f"{path}.post_attention_layernorm", hidden),
        mlp=_mlp(config, builder, backend, f"{path}.mlp"),
    )


def _attention(
    config: ModelConfig, builder: ModelBuilder, backend: Backend, index: int
) -> Attention:
    path = f"model.layers.{index}.self_attn"
    q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    outs = {f"{path}.q_proj": q_size, f"{path}.k_proj": kv_size, f"{path}.v_proj": kv_size}
    return Attention(
        layer=index,
        qkv=builder.linear(config.hidden_size, outs, bias=config.qkv_bias),
        out=builder.linear(
            q_size, {f"{path}.o_proj": config.hidden_size}, bias=config.attention_out_bias
        ),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=config.windows[index],
        qk_norm=_qk_norm(config, builder, backend, path) if config.qk_norm else None,
        side_attention=SideAttention.BEFORE_OUT,
        backend=backend,
    )


def _qk_norm(config: ModelConfig, builder: ModelBuilder, backend: Backend, path: str) -> QKNorm:
    return QKNorm(
        query=_norm(config, builder, backend, f"{path}.q_norm", config.head_dim),
        key=_norm(config, builder, backend, f"{path}.k_norm", config.head_dim),
    )


def _mlp(config: ModelConfig, builder: ModelBuilder, backend: Backend, path: str) -> GatedMLP:
    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up = {f"{path}.gate_proj": inner, f"{path}.up_proj": inner}
    return GatedMLP(
        gate_up=builder.linear(hidden, gate_up, bias=config.mlp_bias),
        down=builder.linear(inner, {f"{path}.down_proj": hidden}, bias=config.mlp_bias),
        backend=backend,
    )


def _norm(
    config: ModelConfig, builder: ModelBuilder, backend: Backend, path: str, size: int
) -> RMSNorm:
    site = builder.norm(path, size, has_bias=False)
    return RMSNorm(builder.tensor(f"{path}.weight", size), config.norm_eps, site.index, backend)
