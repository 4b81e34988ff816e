"""A program: compiles two kernels with planted faults and prints what is found, as JSON."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import triton
import triton.language as tl

from deltamux.benchmarks.compile_kernels import compile_all, fault_lines, jobs_of
from deltamux.kernels.gpu.launch import Launch
from deltamux.kernels.gpu.production import Production
from deltamux.kernels.gpu.shapes import Shapes, shape_only


@triton.jit
def spilling_kernel(x, y, SIZE: tl.constexpr):
    """y = x xᵀ x elementwise over a tile that no register file holds."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    first = tl.load(x + row * SIZE + column).to(tl.float32)
    second = tl.load(x + column * SIZE + row).to(tl.float32)
    total = tl.sum(first, axis=1)[:, None] + tl.sum(second, axis=0)[None, :]
    tl.store(y + row * SIZE + column, (first * total + second).to(y.dtype.element_ty))


@triton.jit
def vector_kernel(x, y, SIZE: tl.constexpr):
    """y = x xᵀ, by sums over products."""
    index = tl.arange(0, SIZE)
    tile = tl.load(x + index[:, None] * SIZE + index[None, :]).to(tl.float32)
    product = tl.sum(tile[:, None, :] * tile[None, :, :], axis=2)
    tl.store(y + index[:, None] * SIZE + index[None, :], product.to(y.dtype.element_ty))


@triton.jit
def broken_kernel(x, y, SIZE: tl.constexpr):
    """Adds what has no common shape."""
    sums = tl.arange(0, SIZE) + tl.arange(0, 2 * SIZE)
    tl.store(y + sums, tl.load(x + sums))


def spilling(_: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    yield replace(_launch(spilling_kernel, dtype, 128), num_warps=1)


def vector(_: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    yield _launch(vector_kernel, dtype, 16, matrix=True)


def broken(_: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    yield _launch(broken_kernel, dtype, 16)


def _launch(kernel: object, dtype: torch.dtype, size: int, matrix: bool = False) -> Launch:
    tile = shape_only(size, size, dtype=dtype)
    return Launch(kernel, (1,), {"x": tile, "y": tile}, {"SIZE": size}, matrix=matrix)


def operations() -> Mapping[str, Production]:
    return {"spilling": spilling, "vector": vector, "broken": broken}


if __name__ == "__main__":
    rows = compile_all(jobs_of(operations, (torch.bfloat16,)))
    sys.stdout.write(json.dumps([line for row in rows for line in fault_lines(row)]))
