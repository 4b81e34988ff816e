"""write_kv and paged_attention in C++ (``cpu.cpp``): checks what is given and passes addresses."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..cpu.library import (
    FLOAT,
    INT,
    POINTER,
    ROWS,
    Kernels,
    Latest,
    Library,
    address,
    raise_if,
    require,
)
from .op import PagedBatch, blocks_are_dense

_WRITE_ARGUMENTS = (POINTER, INT, POINTER, INT, POINTER, POINTER, ROWS, INT)
_ATTEND_ARGUMENTS = (POINTER, INT, INT, ROWS, INT, POINTER, POINTER, POINTER, FLOAT, INT, INT)

_UNLIMITED = 2**62  # keys; no context is longer, and positions minus it stay in 64 bits


class _Batch(ctypes.Structure):
    _fields_ = (
        ("cu_seqlens_q", POINTER),
        ("context_starts", POINTER),
        ("context_lens", POINTER),
        ("block_tables", POINTER),
        ("sequences", INT),
        ("max_blocks", INT),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("keys", POINTER),
        ("values", POINTER),
        ("blocks", INT),
        ("block_stride", INT),
        ("kv_heads", INT),
        ("block_size", INT),
        ("head_dim", INT),
    )


class CompiledAttention:
    """The operations of ``op`` for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        """Find the kernels in the library."""
        self._write = Kernels(library, "write_kv", _WRITE_ARGUMENTS)
        self._attend = Kernels(library, "paged_attention", _ATTEND_ARGUMENTS)
        self._batch = Latest(_prepare_batch)

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: A slot lies outside the cache; nothing was written.
        """
        rows, kv_heads, head_dim = key.shape
        cache = _cache(key_cache, value_cache)
        require(
            key.shape == value.shape
            and (kv_heads, head_dim) == (cache.kv_heads, cache.head_dim)
            and key.stride(1) == value.stride(1) == head_dim
            and slot_mapping.shape[0] == rows,
            "write_kv: key, value, caches and slot_mapping do not fit together",
        )
        error = self._write.of(key, value, key_cache)(
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            ctypes.byref(cache),
            address(slot_mapping, torch.int64, "slot_mapping"),
            rows,
            torch.get_num_threads(),
        )
        raise_if(error, "write_kv")

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See ``op``.

        Raises:
            ValueError: A tensor has the wrong dtype, device, shape or layout.
            IndexError: The batch's tables contradict each other or reach outside the cache.
        """
        rows, heads, head_dim = query.shape
        cache = _cache(key_cache, value_cache)
        require(
            head_dim == cache.head_dim and heads % cache.kv_heads == 0,
            "paged_attention: the query's heads do not fit the cache's",
        )
        require(window is None or window > 0, "paged_attention: the window must be positive")
        out = torch.empty((rows, heads, head_dim), dtype=query.dtype)
        error = self._attend.of(query, key_cache)(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            rows,
            heads // cache.kv_heads,
            out.data_ptr(),
            ctypes.byref(cache),
            self._batch(batch),
            scale,
            _UNLIMITED if window is None else window,
            torch.get_num_threads(),
        )
        raise_if(error, "paged_attention")
        return out


def _cache(keys: Tensor, values: Tensor) -> _Cache:
    require(keys.shape == values.shape, "the key cache and the value cache differ in shape")
    for name, cache in (("key_cache", keys), ("value_cache", values)):
        if not (cache.is_cpu and cache.dtype is keys.dtype and blocks_are_dense(cache)):
            raise ValueError(
                f"{name} must be {keys.dtype} on the CPU with dense blocks, and is {cache.dtype} on"
                f" {cache.device} with strides {cache.stride()}"
            )
    require(keys.stride(0) == values.stride(0), "keys and values lie in different strides")
    blocks, *sizes = keys.shape
    return _Cache(keys.data_ptr(), values.data_ptr(), blocks, keys.stride(0), *sizes)


def _prepare_batch(batch: PagedBatch) -> Any:
    sequences, max_blocks = batch.block_tables.shape
    require(
        batch.cu_seqlens_q.shape == (sequences + 1,)
        and batch.context_starts.shape == batch.context_lens.shape == (sequences,),
        "paged_attention: the batch's tables differ in their number of sequences",
    )
    return ctypes.byref(
        _Batch(
            address(batch.cu_seqlens_q, torch.int32, "cu_seqlens_q"),
            address(batch.context_starts, torch.int32, "context_starts"),
            address(batch.context_lens, torch.int32, "context_lens"),
            address(batch.block_tables, torch.int32, "block_tables"),
            sequences,
            max_blocks,
        )
    )
