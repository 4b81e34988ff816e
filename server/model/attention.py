"""Self-attention over the paged KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from ...adapters.device.batch import AdapterBatch
from ...kernels.backend import Backend
from ...kernels.paged_attention.op import PagedBatch
from .blocks import Linear, RMSNorm


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, each (num_blocks, kv_heads, block_size, head_dim).

    A block of all layers is a *page*, one piece of memory that can be lent to something else.

    Attributes:
        pages: (num_blocks, page_bytes) uint8, what the others are views of.
        keys: By layer.
        values: By layer.
    """

    pages: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole blocks, given as (n,) int64 each."""
        self.pages[target] = self.pages[source]

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, given as pairs of from and to."""
        with torch.inference_mode():
            self.copy(*torch.tensor(moves, device=self.pages.device).unbind(1))

    @property
    def block_size(self) -> int:
        """Tokens of one block."""
        return self.keys[0].shape[2]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers share in one forward pass.

    Attributes:
        kv: Where keys and values live.
        batches: Per layer, how rows lie over sequences and cache blocks.
        rotation: cos and sin of the rows' positions, None where positions are learned.
        deltas: The rows' adapters, None without any.
    """

    kv: KVCache
    batches: Sequence[PagedBatch]
    rotation: tuple[Tensor, Tensor] | None
    deltas: AdapterBatch | None


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Each head of query and key is normalised on its own before the rotation (Qwen3)."""

    query: RMSNorm
    key: RMSNorm


class SideAttention(Enum):
    """Where PEFT adds an adaption prompt's attention in a family: to the heads, or behind them."""

    BEFORE_OUT = auto()
    AFTER_OUT = auto()


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention of one layer.

    Attributes:
        layer: Index into the cache, and where adapters know it.
        qkv: One GEMM, its output the heads of q, then of k, then of v.
        out: From all heads back to the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        window: Keys back that a row sees, its own included; None sees all.
        qk_norm: None in most families.
        side_attention: Where adapters' own attention is added.
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
    side_attention: SideAttention
    backend: Backend

    @property
    def _scale(self) -> float:
        return float(self.head_dim**-0.5)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x (rows, hidden) -> (rows, hidden); the rows' keys and values enter the cache."""
        query, key, value = self._project(x, step)
        keys, values = step.kv.keys[self.layer], step.kv.values[self.layer]
        batch = step.batches[self.layer]
        self.backend.write_kv(key, value, keys, values, batch.slot_mapping)
        attended = self.backend.paged_attention(
            query, keys, values, batch, self._scale, self.window
        )
        if self.side_attention is SideAttention.BEFORE_OUT:
            self._attend_aside(attended, query, step)
        y = self.out.forward(attended.flatten(1), step.deltas)
        if self.side_attention is SideAttention.AFTER_OUT:
            self._attend_aside(y.view_as(attended), query, step)
        return y

    def _attend_aside(self, out: Tensor, query: Tensor, step: Step) -> None:
        if step.deltas is not None:
            step.deltas.attention(out, query, self.layer, self.num_kv_heads, self._scale)

    def _project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """-> query (rows, heads, head_dim), key and value (rows, kv_heads, head_dim)."""
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        heads = self.qkv.forward(x, step.deltas).view(-1, sum(counts), self.head_dim)
        query, key, value = torch.split(heads, counts, dim=1)
        if self.qk_norm is not None:
            query = self.qk_norm.query.forward(query, step.deltas)
            key = self.qk_norm.key.forward(key, step.deltas)
        if step.rotation is not None:
            self.backend.rotary(query, key, *step.rotation)
        return query, key, value
