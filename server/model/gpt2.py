"""GPT-2: layer norms, learned positions and a plain MLP, its projections stored transposed."""

from ...kernels.backend import Backend
from .attention import Attention, SideAttention
from .blocks import LayerNorm
from .builder import ModelBuilder
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer
from .mlp import PlainMLP


def assemble(config: ModelConfig, builder: ModelBuilder, backend: Backend) -> Decoder:
    """Under the module names of GPT2LMHeadModel; c_attn is one adapter target for q, k and v."""
    hidden = config.hidden_size
    tokens = builder.embedding("transformer.wte", config.vocab_size, hidden)
    positions = builder.embedding("transformer.wpe", config.max_position, hidden)
    layers = tuple(_layer(config, builder, backend, index) for index in range(config.num_layers))
    final_norm = _norm(config, builder, "transformer.ln_f")
    head = builder.head(config, tokens.weight)
    return Decoder(
        config=config,
        layout=builder.finish(config),
        tokens=tokens,
        positions=positions,
        layers=layers,
        final_norm=final_norm,
        head=head,
        rotary=None,
    )


def _layer(
    config: ModelConfig, builder: ModelBuilder, backend: Backend, index: int
) -> DecoderLayer:
    path = f"transformer.h.{index}"
    builder.layer(path, f"{path}.attn")
    return DecoderLayer(
        attention_norm=_norm(config, builder, f"{path}.ln_1"),
        attention=_attention(config, builder, backend, index),
        mlp_norm=_norm(config, builder, f"{path}.ln_2"),
        mlp=_mlp(config, builder, f"{path}.mlp"),
    )


def _attention(
    config: ModelConfig, builder: ModelBuilder, backend: Backend, index: int
) -> Attention:
    path, hidden = f"transformer.h.{index}.attn", config.hidden_size
    return Attention(
        layer=index,
        qkv=builder.conv1d(f"{path}.c_attn", hidden, 3 * hidden),
        out=builder.conv1d(f"{path}.c_proj", hidden, hidden),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=config.windows[index],
        qk_norm=None,
        side_attention=SideAttention.AFTER_OUT,
        backend=backend,
    )


def _mlp(config: ModelConfig, builder: ModelBuilder, path: str) -> PlainMLP:
    hidden, inner = config.hidden_size, config.intermediate_size
    return PlainMLP(
        up=builder.conv1d(f"{path}.c_fc", hidden, inner),
        down=builder.conv1d(f"{path}.c_proj", inner, hidden),
        approximate="none" if config.activation == "gelu" else "tanh",
    )


def _norm(config: ModelConfig, builder: ModelBuilder, path: str) -> LayerNorm:
    weight, bias = (
        builder.tensor(f"{path}.{kind}", config.hidden_size) for kind in ("weight", "bias")
    )
    site = builder.norm(path, config.hidden_size, has_bias=True)
    return LayerNorm(weight, bias, config.norm_eps, site.index)
