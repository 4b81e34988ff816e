"""paged_attention and write_kv over a cache whose unused places are poisoned."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from deltamux.kernels.backend import Backend

from .compare import same_bits
from .paged_steps import NAN, check, empty_caches, make_step, sharing, single

Case = tuple[str | int | None, ...]


@pytest.fixture(params=["compiled", "interpreted"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.getfixturevalue(request.param)


def on_both(compiled: Iterable[Case], interpreted: Iterable[Case]) -> list[Case]:
    """Cases of both backends: the interpreter is slow, and gets the awkward ones alone."""
    named = {"compiled": compiled, "interpreted": interpreted}
    return [(name, *case) for name, cases in named.items() for case in cases]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("backend", "head_dim", "group"),
    on_both(product([7, 32, 60, 64, 80, 128], [1, 3, 4, 7]), [(7, 1), (60, 7), (128, 4)]),
    indirect=["backend"],
)
def test_head_sizes_and_groups(
    backend: Backend, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    lens = [(1, 1), (1, 17), (5, 70), (33, 33)]
    check(backend, make_step(dtype, lens, 2 * group, 2, head_dim))


@pytest.mark.parametrize(
    ("backend", "q_len", "context"),
    on_both(
        [(1, 64), (1, 65), (1, 1000), (2, 64), (16, 16), (31, 95), (32, 33), (97, 97), (300, 411)],
        [(1, 65), (2, 64), (63, 95)],
    ),
    indirect=["backend"],
)
def test_one_sequence(backend: Backend, dtype: torch.dtype, q_len: int, context: int) -> None:
    check(backend, make_step(dtype, [(q_len, context)]))


@pytest.mark.parametrize(
    ("backend", "block_size"),
    on_both([(1,), (3,), (16,), (64,), (256,)], [(1,), (3,), (256,)]),
    indirect=["backend"],
)
def test_block_sizes(backend: Backend, dtype: torch.dtype, block_size: int) -> None:
    check(backend, make_step(dtype, [(1, 129), (40, 140), (1, 3)], block_size=block_size))


@pytest.mark.parametrize(
    ("backend", "window"),
    on_both([(w,) for w in (1, 2, 16, 63, 64, 65, 200, 10_000)], [(1,), (65,)]),
    indirect=["backend"],
)
def test_sliding_windows(backend: Backend, dtype: torch.dtype, window: int) -> None:
    check(backend, make_step(dtype, [(1, 150), (70, 200), (1, 1), (130, 130)]), window)


def test_keys_before_the_window_are_not_read(backend: Backend, dtype: torch.dtype) -> None:
    step = make_step(dtype, [(1, 150)], block_size=1)
    for cache in (step.key_cache, step.value_cache):
        cache[step.batch.block_tables[0, :100].long()] = NAN
    check(backend, step, window=50)


@pytest.mark.parametrize(
    ("backend", "window", "start"),
    [
        *product(["compiled", "reference"], [None, 1, 40], [1, 15, 16, 64, 130]),
        ("interpreted", None, 15),
        ("interpreted", 40, 64),
    ],
    indirect=["backend"],
)
def test_keys_before_the_start_are_not_seen(
    backend: Backend, dtype: torch.dtype, window: int | None, start: int
) -> None:
    lens = [(1, start + 1), (1, 200), (70, 200), (start + 3, 2 * start + 3), (3, 3)]
    step = make_step(dtype, lens, starts=[start, start, start, start, 0])
    check(backend, step, window)


@pytest.mark.parametrize("window", [None, 40])
def test_the_start_of_one_sequence_leaves_the_bits_of_the_others(
    compiled: Backend, dtype: torch.dtype, window: int | None
) -> None:
    lens = [(1, 50), (70, 150), (3, 80), (1, 200)]
    plain = check(compiled, make_step(dtype, lens), window)
    mixed = check(compiled, make_step(dtype, lens, starts=[0, 0, 70, 5]), window)
    assert same_bits(plain[:71], mixed[:71])
    if window is None:
        assert not torch.equal(plain[71:], mixed[71:])


@pytest.mark.parametrize("window", [None, 40])
def test_a_row_behind_a_start_has_the_same_bits_in_any_chunk(
    compiled: Backend, dtype: torch.dtype, window: int | None
) -> None:
    step = make_step(dtype, [(2, 50), (120, 150)], starts=[13, 30])
    together = check(compiled, step, window)
    for i, rows, chunk in ((0, 2, 1), (1, 120, 1), (1, 120, 7), (1, 120, 120)):
        for first in range(0, rows, chunk):
            last = min(rows, first + chunk)
            part = single(step, i, first, last)
            out = compiled.paged_attention(
                part.query, part.key_cache, part.value_cache, part.batch, 0.125, window
            )
            assert same_bits(out, together[2 * i + first : 2 * i + last])


def test_large_scores_do_not_overflow(backend: Backend, dtype: torch.dtype) -> None:
    step = make_step(dtype, [(70, 200), (1, 90)])
    for tensor in (step.query, step.key_cache):
        tensor.round_()  # whole numbers, so that float32 holds every score exactly
    whole = replace(step, keys=tuple(keys.round() for keys in step.keys))
    check(backend, whole, scale=16.0)


@pytest.mark.parametrize("window", [None, 40])
def test_a_row_has_the_same_bits_in_decode_in_any_chunk_and_in_any_company(
    compiled: Backend, dtype: torch.dtype, window: int | None
) -> None:
    step = make_step(dtype, [(1, 50), (120, 150), (3, 3), (1, 200)])
    together = check(compiled, step, window)
    bounds = step.batch.cu_seqlens_q.tolist()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for i, chunk in ((0, 1), (1, 1), (1, 7), (1, 120), (2, 1), (3, 1)):
            rows = bounds[i + 1] - bounds[i]
            for first in range(0, rows, chunk):
                last = min(rows, first + chunk)
                part = single(step, i, first, last)
                out = compiled.paged_attention(
                    part.query, part.key_cache, part.value_cache, part.batch, 0.125, window
                )
                assert same_bits(out, together[bounds[i] + first : bounds[i] + last])


@pytest.mark.parametrize(
    ("block_size", "start", "window"), [(16, 0, None), (16, 21, None), (64, 0, 150), (3, 0, None)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 8), (14, 2)])
def test_sequences_that_share_blocks_have_the_bits_they_have_alone(
    compiled: Backend,
    dtype: torch.dtype,
    block_size: int,
    start: int,
    window: int | None,
    heads: int,
    kv_heads: int,
) -> None:
    contexts = [300, 221, 222, 300, 64, 400, 90, 130, 260, 255, 257, 301]
    lens = [(1, context) for context in contexts] + [(70, 290), (1, 100)]
    starts = [start] * len(lens)
    step = make_step(dtype, lens, heads, kv_heads, block_size=block_size, starts=starts)
    counts = [0, 216, 216, 216, 0, 216, 72, 128, 192, 192, 216, 216, 192, 99]
    step = sharing(step, [count // block_size for count in counts])
    together = check(compiled, step, window, scale=0.125)
    bounds = step.batch.cu_seqlens_q.tolist()
    for i in range(len(lens)):
        alone = single(step, i, 0, lens[i][0])
        out = compiled.paged_attention(
            alone.query, alone.key_cache, alone.value_cache, alone.batch, 0.125, window
        )
        assert same_bits(out, together[bounds[i] : bounds[i + 1]])


def test_a_nan_stays_in_its_sequence(backend: Backend, dtype: torch.dtype) -> None:
    step = make_step(dtype, [(1, 50), (1, 60), (4, 20)])
    clean = check(backend, step)
    step.query[1, 2, 3] = NAN
    out = backend.paged_attention(
        step.query, step.key_cache, step.value_cache, step.batch, 0.125, None
    )
    assert out[1, 2].isnan().all()
    others = torch.ones(out.shape[:2], dtype=torch.bool)
    others[1, 2] = False
    assert same_bits(out[others], clean[others])


def test_sequences_without_query_rows(backend: Backend, dtype: torch.dtype) -> None:
    check(backend, make_step(dtype, [(0, 20), (2, 20), (0, 5)]))


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_write_kv_fills_its_slots_and_no_other(
    backend: Backend, reference: Backend, dtype: torch.dtype, rows: int
) -> None:
    rng = torch.Generator().manual_seed(0)
    caches = [*empty_caches(40, 3, 16, 60, dtype), *empty_caches(40, 3, 16, 60, dtype)]
    wide = torch.randn(rows, 15, 60, generator=rng).to(dtype)
    slots = torch.randperm(40 * 16, generator=rng)[:rows]
    backend.write_kv(wide[:, 9:12], wide[:, 12:], caches[0], caches[1], slots)
    reference.write_kv(wide[:, 9:12], wide[:, 12:], caches[2], caches[3], slots)
    assert same_bits(caches[0], caches[2])
    assert same_bits(caches[1], caches[3])


@pytest.mark.parametrize("slot", [-1, 64])
def test_write_kv_refuses_a_slot_outside_the_cache(compiled: Backend, slot: int) -> None:
    cache = torch.zeros(4, 1, 16, 8)
    key = torch.ones(2, 1, 8)
    with pytest.raises(IndexError, match="slot outside the cache"):
        compiled.write_kv(key, key, cache, cache.clone(), torch.tensor([3, slot]))
    assert not cache.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_tables": torch.tensor([[0, 99]], dtype=torch.int32)}, "block outside the cache"),
        ({"block_tables": torch.tensor([[0, -1]], dtype=torch.int32)}, "block outside the cache"),
        ({"block_tables": torch.tensor([[0]], dtype=torch.int32)}, "longer than its block table"),
        ({"context_lens": torch.tensor([3], dtype=torch.int32)}, "more query rows than context"),
        ({"context_starts": torch.tensor([17], dtype=torch.int32)}, "before its query rows"),
        ({"context_starts": torch.tensor([-1], dtype=torch.int32)}, "before its query rows"),
        ({"cu_seqlens_q": torch.tensor([0, 9], dtype=torch.int32)}, "number of rows"),
        ({"cu_seqlens_q": torch.tensor([1, 4], dtype=torch.int32)}, "number of rows"),
    ],
)
def test_tables_that_reach_outside_are_refused(
    compiled: Backend, changes: dict[str, Tensor], words: str
) -> None:
    step = make_step(torch.float32, [(4, 20)])
    batch = replace(step.batch, **changes)
    with pytest.raises(IndexError, match=words):
        compiled.paged_attention(step.query, step.key_cache, step.value_cache, batch, 0.125, None)


def test_blocks_that_are_not_dense_or_lie_differently_are_refused(backend: Backend) -> None:
    step = make_step(torch.float32, [(4, 20)])
    strided = step.key_cache.transpose(2, 3).contiguous().transpose(2, 3)
    for caches, words in (
        ((strided, step.value_cache), "key_cache must be"),
        ((step.key_cache, step.value_cache.contiguous()), "different strides"),
    ):
        with pytest.raises(ValueError, match=words):
            backend.paged_attention(step.query, *caches, step.batch, 0.125, None)


def test_wrong_tensors_are_refused_by_what_is_wrong(backend: Backend) -> None:
    step = make_step(torch.float32, [(4, 20)])
    cases = [
        ({"query": step.query.bfloat16()}, "bfloat16"),
        ({"query": step.query[:, :7]}, "heads do not fit"),
        ({"key_cache": step.key_cache[:, :, :8]}, "differ in shape"),
        ({"value_cache": step.value_cache.half()}, "value_cache must be"),
        ({"batch": replace(step.batch, context_lens=torch.tensor([20]))}, "context_lens must be"),
        ({"batch": replace(step.batch, context_starts=torch.tensor([0]))}, "context_starts must"),
        (
            {"batch": replace(step.batch, context_starts=torch.zeros(2, dtype=torch.int32))},
            "number of sequences",
        ),
    ]
    for changes, words in cases:
        wrong = replace(step, **changes)
        with pytest.raises(ValueError, match=words):
            backend.paged_attention(
                wrong.query, wrong.key_cache, wrong.value_cache, wrong.batch, 0.125, None
            )
