"""write_kv and paged_attention on a GPU, by a batch of which the host knows bounds alone.

A step with more than one row in some sequence is one launch: a program has some rows of a sequence
and all query heads of one KV head, which it multiplies as one matrix, so that a key is read once
for all of them. Which sequence a program's rows are of, it finds on the device.

A decode step has one row per sequence: too few programs to fill a GPU, each with a long loop. There
the keys are split over programs, and a second launch combines what they found:

    decode   m, l, sums over the keys of a split, float32,
    combine  o = sum of 2^(m - max m) sums / sum of 2^(m - max m) l over the splits.

The keys and values are read once and are nearly all bytes that a decode step moves: 4 head_dim
bytes per key and KV head in 16 bits, against 8 head_dim per split and query head of what the splits
write and the combination reads. Splits without keys write nothing. The blocks of keys that are
multiplied at once are independent of the cache's block size: every key finds its own place through
the block table. Weights are multiplied with values as sums of two 16-bit numbers (``dot_wide``), so
that the one rounding of a result is that of the output.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gpu.corrections import check_rows
from ..gpu.launch import Argument, Launch, ceil_div, run_all
from ..gpu.registry import register
from ..gpu.shapes import Shapes, shape_only
from ..gpu.tuning import Choice, Key, Measured
from .gpu_kernels import chunk_kernel, combine_kernel, decode_kernel, write_kv_kernel
from .op import PagedAttention, PagedBatch, blocks_are_dense

_LOG2_E = math.log2(math.e)
_UNLIMITED = 2**30  # keys: no context is longer, and positions minus it stay in 32 bits
_MAX_SPLITS = 64
_WRITE_BLOCK = 1024  # numbers of a row that one program copies, 16 bytes per thread


class Config(NamedTuple):
    """How attention is cut into programs.

    Attributes:
        rows: Query rows times the query heads of a KV head, of a program with a chunk's rows; half
            as many in float32.
        keys: Multiplied at once, if of up to 256 bytes each; fewer wide ones.
        programs: Wanted of a decode step; its keys are split to come near it.
        num_warps: Of a program.
        num_stages: Loads under way; half of them of keys, whose places are themselves loaded.
    """

    rows: int
    keys: int
    programs: int
    num_warps: int
    num_stages: int


CONFIGS = (
    Config(16, 64, 512, 4, 3),
    Config(16, 64, 2048, 4, 5),
    Config(16, 32, 1024, 2, 5),
    Config(16, 128, 1024, 8, 3),
    Config(64, 32, 512, 4, 5),
    Config(64, 64, 512, 8, 5),
    Config(128, 32, 1024, 8, 5),
    Config(128, 64, 1024, 8, 5),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0 if key.inner <= 2048 else 1
    return 5 if key.rows <= 64 else 7


@dataclass(frozen=True, slots=True)
class Attention:
    """The operands of one call, as kernels take them; see ``op``.

    Attributes:
        query: (rows, heads, head_dim), dense in its last dimension.
        key_cache: (blocks, kv_heads, block_size, head_dim), its blocks dense.
        value_cache: Likewise.
        cu_seqlens_q: int32, as in ``op.PagedBatch``.
        context_starts: int32.
        context_lens: int32.
        block_tables: int32, dense in its last dimension.
        max_seqlen_q: Bound on a sequence's rows.
        max_context_len: Bound on ``context_lens``.
        scale: Of the scores.
        window: Keys that a row sees at most.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    cu_seqlens_q: Tensor
    context_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    max_context_len: int
    scale: float
    window: int

    @property
    def num_sequences(self) -> int:
        """Some may be empty."""
        return self.block_tables.shape[0]

    @property
    def reach(self) -> dict[str, Argument]:
        """The arguments by which a kernel finds a sequence's rows and which keys they see."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "context_starts": self.context_starts,
            "context_lens": self.context_lens,
            "window": self.window,
        }

    @property
    def operands(self) -> dict[str, Argument]:
        """The arguments by which a kernel reads what it multiplies."""
        return {
            "query": self.query,
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
            "block_tables": self.block_tables,
            "query_stride": self.query.stride(0),
            "query_head_stride": self.query.stride(1),
            "table_stride": self.block_tables.stride(0),
            "scale_log2": self.scale * _LOG2_E,
        }

    def constants(self, chosen: Config, rows: int) -> dict[str, int]:
        """Of a kernel that multiplies ``rows`` queries at once, or those of a KV head."""
        _, heads, head_dim = self.query.shape
        _, kv_heads, block_size, _ = self.key_cache.shape
        group = heads // kv_heads
        return {
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "BLOCK_STRIDE": self.key_cache.stride(0),
            "BLOCK_M": max(rows * 2 // self.query.element_size(), _tile(group)),
            "BLOCK_K": self.block_k(chosen),
            "BLOCK_D": _tile(head_dim),
        }

    def block_k(self, chosen: Config) -> int:
        """Keys multiplied at once: no more bytes for wide heads and numbers than for others."""
        width = _tile(self.query.shape[2]) * self.query.element_size()
        return max(chosen.keys * 256 // max(width, 256), 16)


def launches(attention: Attention, out: Tensor, config: int) -> Sequence[Launch]:
    """One launch for chunks of rows; up to two where every sequence has one row at most."""
    if attention.max_seqlen_q > 1:
        return (_chunk(attention, out, CONFIGS[config]),)
    return _decode(attention, out, CONFIGS[config])


def _chunk(attention: Attention, out: Tensor, chosen: Config) -> Launch:
    constants = attention.constants(chosen, chosen.rows)
    block_q = constants["BLOCK_M"] // constants["GROUP"]
    sequences = attention.num_sequences
    return Launch(
        chunk_kernel,
        (out.shape[0] // block_q + sequences, attention.key_cache.shape[1]),
        {"out": out, **attention.operands, **attention.reach, "num_sequences": sequences},
        {**constants, "BLOCK_Q": block_q},
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        matrix=True,
    )


def _decode(attention: Attention, out: Tensor, chosen: Config) -> Sequence[Launch]:
    rows, heads, head_dim = out.shape
    splits = count_splits(attention, chosen)
    scratch = partial(torch.empty, dtype=torch.float32, device=out.device)
    parts = (rows if splits > 1 else 0, heads, splits)
    shared: dict[str, Argument] = {
        "out": out,
        "sums": scratch((*parts, head_dim)),
        "maxima": scratch(parts),
        "totals": scratch(parts),
        **attention.reach,
    }
    constants = {**attention.constants(chosen, 1), "SPLITS": splits}
    decode = Launch(
        decode_kernel,
        (attention.num_sequences, attention.key_cache.shape[1], splits),
        {**shared, **attention.operands},
        constants,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        matrix=True,
    )
    kept = {name: constants[name] for name in ("HEAD_DIM", "SPLITS", "BLOCK_K", "BLOCK_D")}
    combine = Launch(combine_kernel, (attention.num_sequences, heads), shared, kept)
    return (decode, combine) if splits > 1 else (decode,)


def count_splits(attention: Attention, chosen: Config) -> int:
    """Programs that share a sequence's keys: a power of two, near what fills the device.

    How many keys each takes is found on the device, so that it is right for any context.
    """
    programs = max(attention.num_sequences * attention.key_cache.shape[1], 1)
    keys = min(attention.max_context_len, attention.window)
    most = min(ceil_div(keys, attention.block_k(chosen)), _MAX_SPLITS)
    wanted = min(ceil_div(chosen.programs, programs), most)
    return 1 << (max(wanted, 1).bit_length() - 1)


def _tile(size: int) -> int:
    """The least power of two that holds a size and that matrix units take."""
    return max(1 << (size - 1).bit_length(), 16)


def write_launch(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> Launch:
    """Keys and values of all rows."""
    rows, kv_heads, head_dim = key.shape
    return Launch(
        write_kv_kernel,
        (rows, ceil_div(kv_heads * head_dim, _WRITE_BLOCK)),
        {
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": slot_mapping,
            "key_stride": key.stride(0),
            "key_head_stride": key.stride(1),
            "value_stride": value.stride(0),
            "value_head_stride": value.stride(1),
            "kv_heads": kv_heads,
        },
        {
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": key_cache.shape[2],
            "BLOCK_STRIDE": key_cache.stride(0),
            "BLOCK": _WRITE_BLOCK,
        },
    )


def _run_attention(*operands: Any) -> Tensor:
    *given, config = operands
    out = _fake_attention(*operands)
    run_all(launches(Attention(*given), out, config))
    return out


def _fake_attention(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


_WRITE = register(
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor slot_mapping) -> ()",
    lambda *operands: write_launch(*operands).run(),
)
_ATTEND = register(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens_q,"
    " Tensor context_starts, Tensor context_lens, Tensor block_tables, int max_seqlen_q,"
    " int max_context_len, float scale, int window, int config) -> Tensor",
    _run_attention,
    _fake_attention,
)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See ``op``.

    Raises:
        ValueError: A tensor has the wrong dtype, device, shape or layout.
    """
    check_rows("write_kv", key, value)
    _check_cache("write_kv", key, key_cache, value_cache)
    _check_indices("write_kv", key, torch.int64, slot_mapping=slot_mapping)
    if not (
        key.shape == value.shape
        and key.shape[1] == key_cache.shape[1]
        and slot_mapping.shape == key.shape[:1]
    ):
        raise ValueError("write_kv: key, value, caches and slot_mapping do not fit together")
    _WRITE(key, value, key_cache, value_cache, slot_mapping)


def tuned(measured: Measured) -> PagedAttention:
    """paged_attention, with the configurations that were measured best on the device."""
    choice = Choice("paged_attention", choose_config, len(CONFIGS), measured)
    return partial(_paged_attention, choice)


def _paged_attention(
    choice: Choice,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """See ``op``.

    Raises:
        ValueError: A tensor has the wrong dtype, device, shape or layout, or the window is empty.
    """
    check_rows("paged_attention", query)
    _check_cache("paged_attention", query, key_cache, value_cache)
    if query.shape[1] % key_cache.shape[1]:
        raise ValueError("paged_attention: the query's heads do not fit the cache's")
    if window is not None and window <= 0:
        raise ValueError("paged_attention: the window must be positive")
    _check_batch(query, batch)
    out: Tensor = _ATTEND(
        query,
        key_cache,
        value_cache,
        batch.cu_seqlens_q,
        batch.context_starts,
        batch.context_lens,
        batch.block_tables,
        batch.max_seqlen_q,
        batch.max_context_len,
        scale,
        _UNLIMITED if window is None else min(window, _UNLIMITED),
        choice(Key.of(batch.max_seqlen_q, batch.max_context_len, query.shape[2])),
    )
    return out


def _check_cache(name: str, rows: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Raise ValueError unless both caches' blocks are dense, alike, and of the rows' kind."""
    if key_cache.shape != value_cache.shape:
        raise ValueError(f"{name}: the key cache and the value cache differ in shape")
    for given, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        alike = (cache.dtype, cache.device) == (rows.dtype, rows.device)
        if not alike or not blocks_are_dense(cache):
            raise ValueError(
                f"{name}: {given} must be dense in its blocks, {rows.dtype} and on {rows.device};"
                f" it is {cache.dtype} on {cache.device} with strides {cache.stride()}"
            )
    if key_cache.stride(0) != value_cache.stride(0):
        raise ValueError(f"{name}: keys and values lie in different strides")
    if key_cache.dim() != 4 or rows.dim() != 3 or key_cache.shape[3] != rows.shape[2]:
        raise ValueError(
            f"{name}: rows {tuple(rows.shape)} do not fit a cache {tuple(key_cache.shape)}"
        )


def _check_batch(query: Tensor, batch: PagedBatch) -> None:
    """Raise ValueError unless the batch's tables are dense and of one number of sequences."""
    sequences = batch.block_tables.shape[0]
    _check_indices(
        "paged_attention",
        query,
        torch.int32,
        cu_seqlens_q=batch.cu_seqlens_q,
        context_starts=batch.context_starts,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
    )
    if not (
        batch.cu_seqlens_q.shape == (sequences + 1,)
        and batch.context_starts.shape == batch.context_lens.shape == (sequences,)
    ):
        raise ValueError("paged_attention: the batch's tables differ in their number of sequences")


def _check_indices(name: str, like: Tensor, dtype: torch.dtype, **given: Tensor) -> None:
    for argument, tensor in given.items():
        if (tensor.dtype, tensor.device) != (dtype, like.device) or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: {argument} must be {dtype} on {like.device} and dense in its rows; it"
                f" is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """A decode step and a chunk in every configuration, and what writes the chunk's keys."""
    rows, sequences, context = 2048, 64, 8192
    kv = shape_only(rows, shapes.kv_heads, shapes.head_dim, dtype=dtype)
    cache = shape_only(32_768, shapes.kv_heads, 16, shapes.head_dim, dtype=dtype)
    yield write_launch(kv, kv, cache, cache, shape_only(rows, dtype=torch.int64))
    index = partial(shape_only, dtype=torch.int32)
    lengths, tables = index(sequences), index(sequences, context // 16)
    batch = (index(sequences + 1), lengths, lengths, tables)
    for config in range(len(CONFIGS)):
        for window in (_UNLIMITED, 4096):
            for q_len in (1, rows):
                heads = (sequences if q_len == 1 else rows, shapes.heads, shapes.head_dim)
                query = shape_only(*heads, dtype=dtype)
                attention = Attention(query, cache, cache, *batch, q_len, context, 0.1, window)
                yield from launches(attention, query, config)
