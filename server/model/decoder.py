"""The frozen base: embedding, layers, final norm and head, with the step's adapters beside them.

Inference only, so no ``nn.Module``: tensors in frozen dataclasses, called under
``torch.inference_mode`` by the runner.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters.batch import AdapterBatch
from ...adapters.layout import BaseLayout
from ...kernels.paged_attention.op import PagedBatch
from .attention import Attention, KVCache, Step
from .blocks import Embedding, Linear, Norm
from .config import ModelConfig
from .mlp import MLP
from .rope import RotaryTable


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and MLP, each behind its norm and added to the residual stream."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model.

    Attributes:
        config: Sizes and variants.
        layout: The modules that adapters may change.
        embedding: Rows in.
        layers: In order.
        final_norm: After the last layer.
        head: Rows out; shares the embedding's weight where the two are tied.
        rotary: None where positions are learned.
    """

    config: ModelConfig
    layout: BaseLayout
    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    head: Linear
    rotary: RotaryTable | None

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache memory of one token over all layers."""
        config = self.config
        itemsize = self.embedding.tokens.element_size()
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize

    def new_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A cache of ``num_blocks`` blocks, uninitialised: memory is touched where it is used."""
        config, like = self.config, self.embedding.tokens
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        keys, values = (
            tuple(
                torch.empty(shape, dtype=like.dtype, device=like.device)
                for _ in range(config.num_layers)
            )
            for _ in range(2)
        )
        return KVCache(keys, values)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: KVCache,
        batch: PagedBatch,
        deltas: AdapterBatch | None,
    ) -> Tensor:
        """Run every row through all layers and the final norm.

        Args:
            token_ids: (rows,) int64.
            positions: (rows,) int64, each below ``config.max_position``.
            kv: From ``new_kv_cache``; gains the rows' keys and values.
            batch: How rows lie over sequences and cache blocks.
            deltas: The rows' adapters, None for the plain base path.

        Returns:
            (rows, hidden), after the final norm: what ``logits`` takes.
        """
        rotation = None if self.rotary is None else self.rotary.at(positions)
        step = Step(kv, batch, rotation, deltas)
        residual = self.embedding.forward(token_ids, positions)
        x = torch.zeros_like(residual)
        for layer in self.layers:
            x = layer.attention.forward(layer.attention_norm.add(x, residual), step)
            x = layer.mlp.forward(layer.mlp_norm.add(x, residual), deltas)
        return self.final_norm.add(x, residual)

    def logits(self, hidden: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """Head over chosen rows of ``forward``'s result.

        Args:
            hidden: (n, hidden).
            deltas: Segments over these n rows, None without adapters.

        Returns:
            (n, vocab) float32.
        """
        return self.head.forward(hidden, deltas).float()
