"""rms_norm and add_rms_norm on a GPU, in one launch each.

A program holds whole rows in registers: x, the residual and y pass through memory once, and the
weight is read by each program, from cache. Wide rows have a program each; narrow ones (heads) share
one, so that its loads are long enough. The tile depends on the rows' size alone, so that a row's
bits do not depend on its company, and norm_override gives the same ones.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..gpu.launch import Launch, ceil_div, power_of_two
from ..gpu.registry import register
from ..gpu.rows import PROMPT, ROWS, require
from ..gpu.shapes import Shapes, shape_only
from .gpu_kernels import add_rms_norm_kernel, rms_norm_kernel

TILE = 2048
"""Elements of a program at least, as far as there are."""

_WARP_ELEMENTS = 512
_MAX_WARPS = 16


class Tile(NamedTuple):
    """What one program normalises.

    Attributes:
        rows: Of them.
        columns: A power of two that is not below the rows' size.
        num_warps: Of the program: 16 elements a thread, up to 8192 columns.
    """

    rows: int
    columns: int
    num_warps: int


def tile_of(size: int) -> Tile:
    """The tile for rows of this size."""
    columns = power_of_two(size)
    rows = max(1, TILE // columns)
    return Tile(rows, columns, min(max(rows * columns // _WARP_ELEMENTS, 1), _MAX_WARPS))


def norm_launch(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> Launch:
    """Y = rms_norm(x, weight, eps)."""
    heads = x.shape[1] if x.dim() == 3 else 1
    tile, size = tile_of(x.shape[-1]), x.shape[-1]
    return Launch(
        rms_norm_kernel,
        (ceil_div(x.shape[0] * heads, tile.rows),),
        {
            "y": y,
            "x": x,
            "weight": weight,
            "eps": eps,
            "num_rows": x.shape[0],
            "heads": heads,
            "size": size,
            "row_stride": x.stride(0),
            "head_stride": x.stride(1) if x.dim() == 3 else 0,
        },
        {"BLOCK_ROWS": tile.rows, "BLOCK": tile.columns},
        num_warps=tile.num_warps,
    )


def add_norm_launch(y: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Launch:
    """Residual += x; y = rms_norm(residual, weight, eps)."""
    num_rows, size = x.shape
    tile = tile_of(size)
    return Launch(
        add_rms_norm_kernel,
        (ceil_div(num_rows, tile.rows),),
        {
            "y": y,
            "x": x,
            "residual": residual,
            "weight": weight,
            "eps": eps,
            "num_rows": num_rows,
            "size": size,
            "x_stride": x.stride(0),
            "residual_stride": residual.stride(0),
        },
        {"BLOCK_ROWS": tile.rows, "BLOCK": tile.columns},
        num_warps=tile.num_warps,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    require(x.dim() in (2, 3), "rms_norm: x must be (rows, size) or (rows, heads, size)", x)
    require(weight.shape == x.shape[-1:], "rms_norm: the weight does not fit x", x, weight)
    _check_alike("rms_norm", x, weight)
    return _NORM(x, weight, eps)  # type: ignore[no-any-return]  # torch's operations have no type


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``op``; raises ValueError for a wrong dtype, device, shape or layout."""
    require(
        residual.shape == x.shape and weight.shape == x.shape[1:],
        "add_rms_norm: x, the residual and the weight do not fit together",
        x,
        residual,
        weight,
    )
    _check_alike("add_rms_norm", x, residual, weight)
    return _ADD_NORM(x, residual, weight, eps)  # type: ignore[no-any-return]  # as above


def production(shapes: Shapes, dtype: torch.dtype) -> Iterator[Launch]:
    """Of the residual stream, and of the heads of queries and keys."""
    for size in (shapes.hidden, shapes.head_dim):
        for rows in (ROWS, PROMPT):
            weight = shape_only(size, dtype=dtype)
            if size == shapes.hidden:
                x = shape_only(rows, size, dtype=dtype)
                yield add_norm_launch(x, x, x, weight, 1e-5)
            else:
                x = shape_only(rows, shapes.heads, size, dtype=dtype)
            yield norm_launch(x, x, weight, 1e-5)


def _check_alike(name: str, x: Tensor, *others: Tensor) -> None:
    for each in (x, *others):
        alike = each.dtype is x.dtype and each.device == x.device and each.stride(-1) == 1
        require(
            alike, f"{name}: expected {x.dtype} on {x.device}, dense in the last dimension", each
        )


def _run_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _dense_like(x)
    norm_launch(y, x, weight, eps).run()
    return y


def _run_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _dense_like(x)
    add_norm_launch(y, x, residual, weight, eps).run()
    return y


def _dense_like(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_NORM = register("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _run_norm, _dense_like)
_ADD_NORM = register(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    _run_add_norm,
    _dense_like,
)
