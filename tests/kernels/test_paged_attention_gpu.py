"""What only the GPU's paged attention does: splits of keys, padded steps, configurations."""

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from deltamux.kernels.backend import Backend
from deltamux.kernels.gpu.tuning import Key
from deltamux.kernels.paged_attention import gpu
from deltamux.kernels.paged_attention.op import PagedBatch

from .compare import same_bits
from .on_gpu import placed
from .paged_steps import GARBAGE, NAN, Step, check, empty_caches, exact, make_step

CONTEXTS = (1, 15, 16, 17, 63, 300)


def operands(step: Step, window: int = 2**30) -> gpu.Attention:
    batch = step.batch
    return gpu.Attention(
        step.query,
        step.key_cache,
        step.value_cache,
        batch.cu_seqlens_q,
        batch.context_starts,
        batch.context_lens,
        batch.block_tables,
        batch.max_seqlen_q,
        batch.max_context_len,
        0.125,
        window,
    )


def padded(step: Step, rows: int) -> Step:
    """The step with padding rows behind it: no context, no slot, and nothing but poison to read."""
    batch = step.batch
    last, sequences = int(batch.cu_seqlens_q[-1]), batch.block_tables.shape[0]
    more = torch.zeros(rows, dtype=torch.int32)
    tables = torch.full((sequences + rows, batch.block_tables.shape[1]), GARBAGE).int()
    tables[:sequences] = batch.block_tables
    wider = PagedBatch(
        torch.cat([batch.cu_seqlens_q, last + 1 + torch.arange(rows).int()]),
        torch.cat([batch.context_starts, more]),
        torch.cat([batch.context_lens, more]),
        tables,
        torch.cat([batch.slot_mapping, torch.full((rows,), -1)]),
        batch.max_seqlen_q,
        batch.max_context_len,
    )
    query = torch.full((last + rows, *step.query.shape[1:]), NAN, dtype=step.query.dtype)
    query[:last] = step.query
    return replace(step, query=query, batch=wider)


@pytest.mark.parametrize("window", [None, 100])
def test_a_decode_row_is_the_sum_of_its_splits(
    interpreted: Backend, dtype: torch.dtype, window: int | None
) -> None:
    lens = [*((1, each) for each in CONTEXTS), (0, 20), (1, 90), (1, 300)]
    starts = [0, 0, 0, 13, 62, 0, 0, 70, 200]
    step = make_step(dtype, lens, heads=2, kv_heads=1, block_size=3, starts=starts)
    assert gpu.count_splits(operands(step, window or 2**30), gpu.CONFIGS[0]) > 1
    check(interpreted, step, window)


def test_splits_are_right_for_contexts_that_the_host_expected_otherwise(
    interpreted: Backend,
) -> None:
    step = make_step(torch.float32, [(1, 300), (1, 5)], heads=2, kv_heads=1)
    for bound in (1, 100, 3000):
        check(interpreted, replace(step, batch=replace(step.batch, max_context_len=bound)))


def test_a_mixed_step(interpreted: Backend, dtype: torch.dtype) -> None:
    lens = [(1, 300), (0, 9), (1, 15), (70, 90), (1, 17), (5, 5), (1, 1)]
    starts = [250, 0, 0, 20, 16, 0, 0]
    check(interpreted, make_step(dtype, lens, heads=4, kv_heads=1, starts=starts), 60)


@pytest.mark.parametrize("lens", [[(1, 20), (1, 200)], [(1, 20), (3, 70)]])
def test_padding_reads_nothing_and_gives_zeros(
    interpreted: Backend, dtype: torch.dtype, lens: Sequence[tuple[int, int]]
) -> None:
    step = make_step(dtype, lens, heads=2, kv_heads=1)
    rows = len(step.query)
    wider = padded(step, 3)
    out = interpreted.paged_attention(
        wider.query, step.key_cache, step.value_cache, wider.batch, 0.125, None
    )
    assert not out[rows:].any()
    torch.testing.assert_close(
        out[:rows].float(), exact(step, 0.125, None), rtol=2.0**-8, atol=4e-5
    )


def test_padding_is_written_nowhere(interpreted: Backend, dtype: torch.dtype) -> None:
    caches = empty_caches(4, 3, 16, 60, dtype)
    drawn = torch.randn(4, 3, 60).to(dtype)
    interpreted.write_kv(drawn, -drawn, caches[0], caches[1], torch.tensor([17, -1, 63, -1]))
    for cache, sign in zip(caches, (1, -1), strict=True):
        expected = torch.full_like(cache, NAN)
        expected[1, :, 1], expected[3, :, 15] = sign * drawn[0], sign * drawn[2]
        assert same_bits(cache, expected)


def test_float16(interpreted: Backend) -> None:
    for lens in ([(1, 150), (1, 3)], [(1, 150), (20, 33)]):
        step = make_step(torch.float16, lens, heads=3, kv_heads=1)
        out = interpreted.paged_attention(
            step.query, step.key_cache, step.value_cache, step.batch, 0.125, None
        )
        torch.testing.assert_close(out.float(), exact(step, 0.125, None), rtol=2.0**-11, atol=4e-5)


@pytest.mark.parametrize("config", range(len(gpu.CONFIGS)))
def test_every_configuration_computes_the_same(interpreted: Backend, config: int) -> None:
    for lens in ([(1, 140), (1, 3)], [(1, 140), (20, 33)]):
        step = make_step(torch.bfloat16, lens, heads=3, kv_heads=1)
        key = Key.of(step.batch.max_seqlen_q, step.batch.max_context_len, 64)
        tuned = placed(gpu.tuned({"paged_attention": {key: config}}))
        check(replace(interpreted, paged_attention=tuned), step)


@pytest.mark.parametrize(
    ("sequences", "context", "window", "splits"),
    [(1, 8192, 2**30, 32), (64, 8192, 2**30, 1), (2, 8192, 100, 2), (1, 1, 2**30, 1)],
)
def test_keys_are_split_until_the_device_is_full(
    sequences: int, context: int, window: int, splits: int
) -> None:
    query, cache = torch.empty(sequences, 32, 128), torch.empty(1, 8, 16, 128)
    index = torch.empty(sequences + 1, dtype=torch.int32)
    given = gpu.Attention(
        query.half(),
        cache.half(),
        cache.half(),
        index,
        index[1:],
        index[1:],
        index[1:, None],
        1,
        context,
        0.1,
        window,
    )
    assert gpu.count_splits(given, gpu.Config(16, 64, 256, 4, 3)) == splits


def test_tracing_needs_no_memory() -> None:
    given = operands(make_step(torch.float32, [(4, 20)]))
    values = [getattr(given, field.name) for field in fields(given)]
    out = torch.ops.deltamux.paged_attention(
        *(each.to("meta") if isinstance(each, Tensor) else each for each in values), 0
    )
    assert out.is_meta
    assert out.shape == given.query.shape
    assert out.is_contiguous()
