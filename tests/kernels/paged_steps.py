"""Steps over a paged cache whose unused places are poisoned, and what attention gives on them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamux.kernels.backend import Backend
from deltamux.kernels.paged_attention.op import PagedBatch

from .compare import assert_close, same_bits

NAN = float("nan")
GARBAGE = -(2**31)


@dataclass(frozen=True)
class Step:
    """One step's query and caches, with the dense keys and values they were filled from.

    keys[i] and values[i] begin with the first key that sequence i may see.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    batch: PagedBatch
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def empty_caches(
    blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer of three, whose blocks lie side by side as in the server."""
    pages = torch.full((blocks, 3, 2, kv_heads, block_size, head_dim), NAN, dtype=dtype)
    keys, values = pages[:, 1].unbind(1)
    return keys, values


def make_step(
    dtype: torch.dtype,
    lens: Sequence[tuple[int, int]],
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    block_size: int = 16,
    starts: Sequence[int] | None = None,
    seed: int = 0,
) -> Step:
    """lens: (query rows, context) of each sequence; blocks lie shuffled, query rows are strided.

    starts: the first key of each sequence, 0 by default; NaN lies before it.
    """
    starts = [0] * len(lens) if starts is None else starts
    rng = torch.Generator().manual_seed(seed)
    needed = [-(-context // block_size) for _, context in lens]
    free = torch.randperm(sum(needed) + 3, generator=rng).tolist()
    caches = empty_caches(len(free), kv_heads, block_size, head_dim, dtype)
    tables = torch.full((len(lens), max(needed) + 2), GARBAGE, dtype=torch.int32)
    dense: tuple[list[Tensor], list[Tensor]] = ([], [])
    slots: list[Tensor] = []
    for i, (q_len, context) in enumerate(lens):
        blocks = [free.pop() for _ in range(needed[i])]
        tables[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        position = torch.arange(context)
        block, offset = torch.tensor(blocks)[position // block_size], position % block_size
        for cache, kept in zip(caches, dense, strict=True):
            drawn = torch.randn(context, kv_heads, head_dim, generator=rng).to(dtype)
            kept.append(drawn[starts[i] :])
            cache[block[starts[i] :], :, offset[starts[i] :]] = kept[-1]
        slots.append((block * block_size + offset)[context - q_len :])
    rows = sum(q_len for q_len, _ in lens)
    wide = torch.full((rows, heads + 2 * kv_heads, head_dim), NAN, dtype=dtype)
    wide[:, :heads] = torch.randn(rows, heads, head_dim, generator=rng) * 2
    batch = PagedBatch(
        cu_seqlens_q=torch.tensor([0, *(q for q, _ in lens)]).cumsum(0).int(),
        context_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in lens], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        max_seqlen_q=max(q_len for q_len, _ in lens),
        max_context_len=max(context for _, context in lens),
    )
    return Step(wide[:, :heads], *caches, batch, tuple(dense[0]), tuple(dense[1]))


def sharing(step: Step, shared: Sequence[int]) -> Step:
    """The step where the first shared[i] blocks of sequence i are those of sequence 0."""
    tables = step.batch.block_tables.clone()
    block_size = step.key_cache.shape[2]
    starts, dense = step.batch.context_starts.tolist(), (list(step.keys), list(step.values))
    for i, blocks in enumerate(shared):
        tables[i, :blocks] = tables[0, :blocks]
        for kept in dense:
            end = max(0, blocks * block_size - starts[i])
            kept[i] = torch.cat([kept[0][:end], kept[i][end:]])
    batch = replace(step.batch, block_tables=tables)
    return replace(step, batch=batch, keys=tuple(dense[0]), values=tuple(dense[1]))


def exact(step: Step, scale: float, window: int | None) -> Tensor:
    """The formula in float64 on the dense keys and values."""
    out = []
    bounds = step.batch.cu_seqlens_q.tolist()
    for i, (keys, values) in enumerate(zip(step.keys, step.values, strict=True)):
        query = step.query[bounds[i] : bounds[i + 1]].double()
        group = query.shape[1] // keys.shape[1]
        k, v = (t.double().repeat_interleave(group, 1) for t in (keys, values))
        hi = torch.arange(len(keys) - len(query), len(keys))[:, None]
        j = torch.arange(len(keys))[None]
        hidden = (j > hi) | (j <= hi - (window or len(keys) + 1))
        scores = torch.einsum("qhd,khd->hqk", query, k) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out).float()


def check(
    backend: Backend, step: Step, window: int | None = None, scale: float | None = None
) -> Tensor:
    scale = step.query.shape[2] ** -0.5 if scale is None else scale
    before = [t.clone() for t in (step.key_cache, step.value_cache)]
    out = backend.paged_attention(
        step.query, step.key_cache, step.value_cache, step.batch, scale, window
    )
    assert out.shape == step.query.shape
    assert out.is_contiguous()
    assert_close(out, exact(step, scale, window), magnitude=4.0)
    for cache, kept in zip((step.key_cache, step.value_cache), before, strict=True):
        assert same_bits(cache, kept)
    return out


def single(step: Step, sequence: int, first: int, last: int) -> Step:
    """Query rows first .. last of one sequence, with the context they had, as a step alone."""
    batch = step.batch
    start = int(batch.cu_seqlens_q[sequence])
    q_len = int(batch.cu_seqlens_q[sequence + 1]) - start
    context = int(batch.context_lens[sequence]) - q_len + last
    alone = PagedBatch(
        torch.tensor([0, last - first], dtype=torch.int32),
        batch.context_starts[sequence : sequence + 1],
        torch.tensor([context], dtype=torch.int32),
        batch.block_tables[sequence : sequence + 1],
        batch.slot_mapping[start + first : start + last],
        max_seqlen_q=last - first,
        max_context_len=context,
    )
    return replace(step, query=step.query[start + first : start + last], batch=alone)
