"""The frozen base: embedding, layers, final norm and head, with the step's adapters beside them.

Inference only, so no ``nn.Module``: tensors in frozen dataclasses, called under
``torch.inference_mode`` by the runner.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters.base import PrefixKV
from ...adapters.device.batch import AdapterBatch
from ...adapters.layout import BaseLayout, Half
from ...kernels.memory import allocator
from ...kernels.paged_attention.op import PagedBatch
from .attention import Attention, KVCache, Step
from .blocks import Embedding, Linear, Norm
from .config import ModelConfig
from .mlp import MLP
from .rope import RotaryTable

_LINE_BYTES = 64

_ENCODED_BLOCK = 16
"""Tokens of a cache block in ``encode``: one size, for which a GPU's kernels are compiled once."""


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
        tokens: Rows in.
        positions: Added to the rows where positions are learned, else None.
        layers: In order.
        final_norm: After the last layer.
        head: Rows out; shares the embedding's weight where the two are tied.
        rotary: None where positions are learned.
    """

    config: ModelConfig
    layout: BaseLayout
    tokens: Embedding
    positions: Embedding | None
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    head: Linear
    rotary: RotaryTable | None

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache memory of one token over all layers."""
        config = self.config
        itemsize = self.tokens.weight.element_size()
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize

    def page_bytes(self, block_size: int) -> int:
        """Cache memory of one block over all layers, rounded up to whole cache lines."""
        return -(-self.kv_bytes_per_token * block_size // _LINE_BYTES) * _LINE_BYTES

    def new_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A cache of ``num_blocks`` blocks, uninitialised: memory is touched where it is used."""
        size = num_blocks * self.page_bytes(block_size)
        memory = allocator(self.tokens.weight.device, size)((size,), torch.uint8)
        return self.kv_cache_in(memory, block_size)

    def kv_cache_in(self, memory: Tensor, block_size: int) -> KVCache:
        """A cache in ``memory`` (bytes,) uint8, of which every ``page_bytes`` are a block."""
        config, dtype = self.config, self.tokens.weight.dtype
        pages = memory.view(-1, self.page_bytes(block_size))
        used = self.kv_bytes_per_token * block_size // dtype.itemsize
        shape = (config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        layers = pages.view(dtype)[:, :used].unflatten(1, shape).unbind(1)
        return KVCache(
            pages,
            tuple(layer[:, 0] for layer in layers),
            tuple(layer[:, 1] for layer in layers),
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: KVCache,
        batches: Sequence[PagedBatch],
        deltas: AdapterBatch | None,
    ) -> Tensor:
        """Run every row through all layers and the final norm.

        Args:
            token_ids: (rows,) int64.
            positions: (rows,) int64, each below ``config.max_position``.
            kv: From ``new_kv_cache``; gains the rows' keys and values.
            batches: Per layer, how rows lie over sequences and cache blocks.
            deltas: The rows' adapters, None for the plain base path.

        Returns:
            (rows, hidden), after the final norm: what ``logits`` takes.
        """
        x = self.tokens.forward(token_ids, deltas)
        return self._run(x, positions, kv, batches, deltas)

    @torch.inference_mode()
    def encode(self, embeddings: Tensor) -> PrefixKV:
        """Keys and values of the bare base for rows (length, hidden) given in the place of tokens.

        The rows stand at the positions 0, 1, ...; what is computed is what a prompt of tokens with
        these embeddings would leave in the cache.
        """
        length, device = len(embeddings), self.tokens.weight.device
        num_blocks = -(-length // _ENCODED_BLOCK)
        kv = self.new_kv_cache(num_blocks, _ENCODED_BLOCK)
        self._run(
            embeddings.to(device, self.tokens.weight.dtype, copy=True),
            torch.arange(length, device=device),
            kv,
            [_one_sequence(length, num_blocks, device)] * self.config.num_layers,
            None,
        )
        return PrefixKV(_joined(kv.keys, length), _joined(kv.values, length))

    def logits(self, hidden: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """Head over chosen rows of ``forward``'s result.

        Args:
            hidden: (n, hidden).
            deltas: Segments over these n rows, None without adapters.

        Returns:
            (n, vocab) float32.
        """
        y = self.head.forward(hidden, deltas)
        # Not float(): a recorded step would have it make a tensor of megabytes and copy that again.
        return torch.empty_like(y, dtype=torch.float32).copy_(y)

    def _run(
        self,
        residual: Tensor,
        positions: Tensor,
        kv: KVCache,
        batches: Sequence[PagedBatch],
        deltas: AdapterBatch | None,
    ) -> Tensor:
        """All layers over the embedded rows (rows, hidden), which are changed."""
        if self.positions is not None:
            residual += self.positions.forward(positions, deltas)
        rotation = None if self.rotary is None else self.rotary.at(positions)
        step = Step(kv, batches, rotation, deltas)
        following = (*(layer.attention_norm for layer in self.layers[1:]), self.final_norm)
        normed = self.layers[0].attention_norm.forward(residual, deltas)
        for index, (layer, norm) in enumerate(zip(self.layers, following, strict=True)):
            x = layer.attention.forward(normed, step)
            if deltas is not None:
                deltas.half(x, residual, index, Half.ATTENTION)
            x = layer.mlp.forward(layer.mlp_norm.add(x, residual, deltas), deltas)
            if deltas is not None:
                deltas.half(x, residual, index, Half.MLP)
            normed = norm.add(x, residual, deltas)
        return normed


def _joined(layers: Sequence[Tensor], length: int) -> Tensor:
    """Blocks (blocks, heads, block_size, dim) of every layer -> (layers, heads, length, dim)."""
    whole = [layer.transpose(0, 1).flatten(1, 2)[:, :length] for layer in layers]
    return torch.stack(whole)


def _one_sequence(length: int, num_blocks: int, device: torch.device) -> PagedBatch:
    """A whole sequence that fills a cache."""
    bounds = torch.tensor([0, length], dtype=torch.int32, device=device)
    return PagedBatch(
        cu_seqlens_q=bounds,
        context_starts=bounds[:1],
        context_lens=bounds[1:],
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=torch.arange(length, device=device),
        max_seqlen_q=length,
        max_context_len=length,
    )
