"""The formula of ``op`` in plain torch: the oracle of every faster version, in float32."""

import torch
from torch import Tensor

from .op import PagedBatch


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """cache[slot // block_size, :, slot % block_size] = key[row], likewise for the value."""
    block_size = key_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    key_cache[block, :, offset] = key
    value_cache[block, :, offset] = value


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """o_i = softmax_j(scale q_i.k_j) v_j over the keys that row i may see; see ``op``."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    bounds = batch.cu_seqlens_q.tolist()
    contexts = zip(batch.context_starts.tolist(), batch.context_lens.tolist(), strict=True)
    for index, (start, end) in enumerate(contexts):
        rows = slice(bounds[index], bounds[index + 1])
        keys, values = (
            _gather(cache, batch.block_tables[index], start, end)
            for cache in (key_cache, value_cache)
        )
        out[rows] = _attend(query[rows].float(), keys, values, scale, window).to(query.dtype)
    return out


def _gather(cache: Tensor, block_table: Tensor, start: int, end: int) -> Tensor:
    """-> keys or values start .. end, (keys, kv_heads, head_dim) float32."""
    block_size = cache.shape[2]
    blocks = block_table[: -(-end // block_size)].long()
    return cache[blocks].transpose(1, 2).flatten(0, 1)[start:end].float()


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    q_len, num_heads, _ = query.shape
    num_keys, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    last = torch.arange(num_keys - q_len, num_keys, device=query.device)[:, None]
    position = torch.arange(num_keys, device=query.device)[None, :]
    visible = position <= last
    if window is not None:
        visible &= position > last - window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
