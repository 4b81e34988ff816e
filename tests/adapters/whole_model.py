"""Logits of a served base with one lowered adapter: pool, tables and prefix, but no server."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltamux.adapters.device.batch import make_batch
from deltamux.adapters.device.batch_layout import RowRange
from deltamux.adapters.device.pool import AdapterPool
from deltamux.adapters.primitives.lowered import LoweredAdapter
from deltamux.adapters.scope import EveryPosition
from deltamux.kernels.backend import reference_backend
from deltamux.kernels.paged_attention.op import PagedBatch
from deltamux.server.model.base import ServedBase

ROOM = 1 << 20


@torch.inference_mode()
def logits(base: ServedBase, adapter: LoweredAdapter, tokens: Sequence[int]) -> Tensor:
    """Rows (tokens, vocabulary) of one prompt that is computed at once."""
    decoder, length = base.decoder, len(tokens)
    memory = torch.empty(adapter.num_device_bytes + ROOM, dtype=torch.uint8)
    pool = AdapterPool(base.layout, 4, memory, base.dtype)
    placement = pool.install(adapter)
    assert placement is not None
    assert all(part.scope == EveryPosition() for part in adapter.parts)
    passes = [[RowRange(0, length, slot, 1.0)] for slot in placement.slots]
    prefix = adapter.prefix
    start = 0 if prefix is None else prefix.length
    kv = decoder.new_kv_cache(1, start + length)
    if prefix is not None:
        for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
            keys[0, :, :start] = prefix.keys[layer]
            values[0, :, :start] = prefix.values[layer]
    batch = PagedBatch(
        cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32),
        context_starts=torch.tensor([0], dtype=torch.int32),
        context_lens=torch.tensor([start + length], dtype=torch.int32),
        block_tables=torch.zeros((1, 1), dtype=torch.int32),
        slot_mapping=torch.arange(start, start + length),
        max_seqlen_q=length,
        max_context_len=start + length,
    )
    positions = torch.arange(length) + (0 if prefix is None else prefix.position_offset)
    deltas = make_batch(pool, reference_backend().deltas, passes)
    batches = [batch] * base.layout.num_layers
    hidden = decoder.forward(torch.tensor(tokens), positions, kv, batches, deltas)
    return decoder.logits(hidden, deltas)


def prompt_logprobs(base: ServedBase, adapter: LoweredAdapter, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities (tokens - 1,) of every prompt token but the first."""
    rows = logits(base, adapter, tokens)[:-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
