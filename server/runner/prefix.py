"""Fills whole cache blocks beside the model: adapters' prefixes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...adapters.primitives.lowered import KVPrefix
from ..model.attention import KVCache
from ..scheduler.plan import PrefixLoad
from .stage import send


def load_prefix(kv_cache: KVCache, load: PrefixLoad, prefixes: Sequence[KVPrefix]) -> None:
    """Fill the load's blocks; the prefixes stand one behind the other and end with the last block.

    The keys before them in the first block are zero. They are never read.
    """
    block_size, device = kv_cache.block_size, kv_cache.keys[0].device
    num_blocks = -(-load.prefix.length // block_size)
    indices = list(load.blocks)
    rows = send(torch.tensor(list(load.blocks.values())), device)
    for caches, parts in (
        (kv_cache.keys, [prefix.keys for prefix in prefixes]),
        (kv_cache.values, [prefix.values for prefix in prefixes]),
    ):
        blocks = _in_blocks(torch.cat(parts, dim=2), num_blocks, block_size)[:, indices]
        for cache, layer in zip(caches, send(blocks, device), strict=True):
            cache[rows] = layer


def _in_blocks(tensor: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """(layers, heads, length, dim) -> (layers, blocks, heads, block_size, dim), zeros in front."""
    layers, heads, length, dim = tensor.shape
    padded = tensor.new_zeros(layers, heads, num_blocks * block_size, dim)
    padded[:, :, num_blocks * block_size - length :] = tensor
    return padded.view(layers, heads, num_blocks, block_size, dim).transpose(1, 2)
