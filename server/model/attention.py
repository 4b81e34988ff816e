"""Self-attention over the paged KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters.batch import AdapterBatch
from ...kernels.backend import Backend
from ...kernels.paged_attention.op import PagedBatch
from .blocks import Linear, RMSNorm


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, each (num_blocks, kv_heads, block_size, head_dim)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def block_size(self) -> int:
        """Tokens of one block."""
        return self.keys[0].shape[2]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers share in one forward pass.

    Attributes:
        kv: Where keys and values live.
        batch: How rows lie over sequences and cache blocks.
        rotation: cos and sin of the rows' positions, None where positions are learned.
        deltas: The rows' adapters, None without any.
    """

    kv: KVCache
    batch: PagedBatch
    rotation: tuple[Tensor, Tensor] | None
    deltas: AdapterBatch | None


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Each head of query and key is normalised on its own before the rotation (Qwen3)."""

    query: RMSNorm
    key: RMSNorm


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention of one layer.

    Attributes:
        layer: Index into the cache.
        qkv: One GEMM, its output the heads of q, then of k, then of v.
        out: From all heads back to the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        window: Keys back that a row sees, its own included; None sees all.
        qk_norm: None in most families.
        backend: Device operations.
    """

    layer: int
    qkv: Linear
    out: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    qk_norm: QKNorm | None
    backend: Backend

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x (rows, hidden) -> (rows, hidden); the rows' keys and values enter the cache."""
        query, key, value = self._project(x, step)
        keys, values = step.kv.keys[self.layer], step.kv.values[self.layer]
        self.backend.write_kv(key, value, keys, values, step.batch.slot_mapping)
        attended = self.backend.paged_attention(
            query, keys, values, step.batch, self.head_dim**-0.5, self.window
        )
        return self.out.forward(attended.flatten(1), step.deltas)

    def _project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """-> query (rows, heads, head_dim), key and value (rows, kv_heads, head_dim)."""
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        heads = self.qkv.forward(x, step.deltas).view(-1, sum(counts), self.head_dim)
        query, key, value = torch.split(heads, counts, dim=1)
        if self.qk_norm is not None:
            query, key = self.qk_norm.query.forward(query), self.qk_norm.key.forward(key)
        if step.rotation is not None:
            self.backend.rotary(query, key, *step.rotation)
        return query, key, value
