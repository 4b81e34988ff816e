"""Attention over a paged KV cache, for prefill chunks and decode rows in one batch.

For query row i of a sequence with q_len query rows and context_len keys (this step's included),

    o_i = softmax_j(scale * q_i . k_j) v_j    over  lo <= j <= hi,
    hi = context_len - q_len + i,  lo = max(start, hi - window + 1), or start without a window,

where start is the sequence's first key (a prefix that does not fill its blocks leaves the keys
before it empty: they are not read), key j of a sequence is
``cache[block_table[j // block_size], head, j % block_size]``, and query head h reads KV head
``h // (num_heads // num_kv_heads)`` (vLLM's PagedAttention, arXiv:2309.06180).

A block is dense, and from one to the next it may be farther than its size, equally far for keys and
values: so a block over all layers can be one piece of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """How one step's rows lie over sequences and cache blocks.

    Attributes:
        cu_seqlens_q: (sequences + 1,) int32, first row of each sequence and the number of rows.
        context_starts: (sequences,) int32, first key of each sequence, at most the position of its
            first query row.
        context_lens: (sequences,) int32, one past the last key that its last row sees.
        block_tables: (sequences, max_blocks) int32; entries past a sequence's context are not read.
        slot_mapping: (rows,) int64, block * block_size + offset where each row's key and value go.
            On a GPU, a captured decode step is padded with rows of slot -1, which are written
            nowhere, each a sequence of its own with a context of 0, whose attention is 0.
        max_seqlen_q: Bound on the rows of a sequence, known without looking at the tensors.
        max_context_len: Bound on ``context_lens``, likewise.
    """

    cu_seqlens_q: Tensor
    context_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_seqlen_q: int
    max_context_len: int


def blocks_are_dense(cache: Tensor) -> bool:
    """Whether each block of a cache (blocks, kv_heads, block_size, head_dim) is one piece."""
    _, kv_heads, block_size, head_dim = cache.shape
    dense = (block_size * head_dim, head_dim, 1)
    return cache.stride()[1:] == dense and cache.stride(0) >= kv_heads * block_size * head_dim


WriteKV = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""write_kv(key, value, key_cache, value_cache, slot_mapping): key and value (rows, kv_heads,
head_dim), possibly strided over rows, go to their slots of the caches (blocks, kv_heads,
block_size, head_dim)."""

PagedAttention = Callable[[Tensor, Tensor, Tensor, PagedBatch, float, int | None], Tensor]
"""paged_attention(query, key_cache, value_cache, batch, scale, window): query (rows, heads,
head_dim), possibly strided over rows -> a new contiguous (rows, heads, head_dim)."""
