"""One case of every operation at the sizes of a base: a decode step of 64 rows, a prompt of 2048.

A case knows the bytes and operations it cannot do without, each byte once: by ``counting.py`` those
of LoRAs and of the cache, else the adapters' tensors and the rows that are read and written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.gpu.shapes import Shapes
from .counting import Step, Work, count_adapters, count_cache
from .gpu_case import EPS, AdapterStep, Build, Case, Load
from .gpu_operands import (
    MakeCell,
    Operands,
    PagedOperands,
    affine,
    circulant,
    dense,
    kronecker,
    kronecker_inner,
    output_rows,
    paged_operands,
    site_operands,
    sparse,
)
from .gpu_row_cases import row_cases


def all_cases(shapes: Shapes, load: Load) -> Iterator[Build]:
    """Of every operation of a backend but the base's own products."""
    layer = replace(shapes, layers=1)
    for rank in load.ranks:
        for count in load.counts:
            yield partial(_lora, layer, rank, AdapterStep("decode", count, load.rows // count))
        yield partial(_lora, layer, rank, AdapterStep("prompt", 1, load.prompt))
    for context in load.contexts:
        yield partial(_attention, layer, load.rows, 1, context)
    yield partial(_attention, layer, 1, load.prompt, load.prompt)
    for rows in (load.rows, load.prompt):
        for build in (_write_kv, _rms_norm, _add_rms_norm, _rotary, _silu_mul):
            yield partial(build, layer, rows)
    for step in load.steps:
        for kind in _kinds(load):
            yield partial(_correction, layer, step, kind)
    yield from row_cases(layer, load)


def _lora(shapes: Shapes, rank: int, step: AdapterStep, operands: Operands) -> Case:
    """All seven linear modules of a layer, in its four sites; decode steps are captured ones."""
    rows, count = step.rows, step.adapters
    bucket = rows if step.name == "decode" else None
    segments = operands.segments(count, step.each, rank, bucket)
    sites = [
        site_operands(operands, affine(rank), in_size, out_sizes, segments, adapters=count)
        for _, in_size, out_sizes in shapes.sites
    ]
    moved = sum(rows * (in_size + 2 * sum(out_sizes)) for _, in_size, out_sizes in shapes.sites)

    def run(backend: Backend) -> None:
        for site in sites:
            backend.deltas.correct_affine(site.y, site.x, site.table, site.targets, site.segments)

    counted = Step(rows, 1, (rank,) * count, number_bytes=operands.dtype.itemsize)
    return Case(
        "correct_affine",
        f"a layer, rank {rank}, {step.name} of {rows} rows, {count} adapters",
        run,
        count_adapters(shapes, counted) + Work(moved * operands.dtype.itemsize),
        tuple(site.y for site in sites),
    )


def _attention(
    shapes: Shapes, sequences: int, q_len: int, context: int, operands: Operands
) -> Case:
    paged = paged_operands(operands, shapes, sequences, q_len, context)
    size = operands.dtype.itemsize
    # Row i of a prompt sees all keys but those of the rows behind it.
    seen = sequences * sum(context - q_len + i + 1 for i in range(q_len))
    cache = count_cache(shapes, Step(sequences, context, number_bytes=size))
    one_row = count_cache(shapes, Step(1, 1)).flops
    return Case(
        "paged_attention",
        f"{sequences} x {q_len} rows, context {context}",
        partial(_attend, paged),
        Work(cache.num_bytes + 2 * paged.query.nbytes, one_row * seen),
    )


def _attend(paged: PagedOperands, backend: Backend) -> Tensor:
    return backend.paged_attention(
        paged.query, paged.key_cache, paged.value_cache, paged.batch, paged.scale, None
    )


def _write_kv(shapes: Shapes, rows: int, operands: Operands) -> Case:
    paged = paged_operands(operands, shapes, 1, rows, rows)
    key, value = (operands.rows(rows, shapes.kv_heads, shapes.head_dim) for _ in range(2))

    def run(backend: Backend) -> None:
        caches = paged.key_cache, paged.value_cache
        backend.write_kv(key, value, *caches, paged.batch.slot_mapping)

    changed = (paged.key_cache, paged.value_cache)
    return Case("write_kv", f"{rows} rows", run, Work(4 * key.nbytes), changed)


def _rms_norm(shapes: Shapes, rows: int, operands: Operands) -> Case:
    x, weight = operands.rows(rows, shapes.hidden), operands.rows(shapes.hidden)
    return Case(
        "rms_norm",
        f"{rows} rows",
        lambda backend: backend.rms_norm(x, weight, EPS),
        Work(2 * x.nbytes),
    )


def _add_rms_norm(shapes: Shapes, rows: int, operands: Operands) -> Case:
    x, residual = operands.rows(rows, shapes.hidden), operands.rows(rows, shapes.hidden)
    weight = operands.rows(shapes.hidden)
    return Case(
        "add_rms_norm",
        f"{rows} rows",
        lambda backend: backend.add_rms_norm(x, residual, weight, EPS),
        Work(4 * x.nbytes),
        (residual,),
    )


def _rotary(shapes: Shapes, rows: int, operands: Operands) -> Case:
    qkv = operands.rows(rows, shapes.heads + 2 * shapes.kv_heads, shapes.head_dim)
    query, key = qkv[:, : shapes.heads], qkv[:, shapes.heads : shapes.heads + shapes.kv_heads]
    angle = operands.rows(rows, shapes.head_dim // 2).float()
    cos, sin = angle.cos(), angle.sin()
    turned = rows * (shapes.heads + shapes.kv_heads) * shapes.head_dim * qkv.itemsize
    return Case(
        "rotary",
        f"{rows} rows",
        lambda backend: backend.rotary(query, key, cos, sin),
        Work(2 * turned + 2 * cos.nbytes),
        (query, key),
    )


def _silu_mul(shapes: Shapes, rows: int, operands: Operands) -> Case:
    gate_up = operands.rows(rows, 2 * shapes.inner)
    return Case(
        "silu_mul",
        f"{rows} rows",
        lambda backend: backend.silu_mul(gate_up),
        Work(gate_up.nbytes * 3 // 2),
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """Adapters of one kind at one linear module.

    Attributes:
        operation: What computes them.
        name: What they are.
        make: Makes one.
        flops: Operations of a row for each element of the matrix they stand for, where these count.
        columns: Outputs that are written and not read; None where all are both.
    """

    operation: str
    name: str
    make: MakeCell
    flops: int = 0
    columns: int | None = None


def _kinds(load: Load) -> Sequence[_Kind]:
    return (
        _Kind("add_dense", "whole matrices", dense, flops=2),
        _Kind("add_sparse", "8 entries a row", sparse(8)),
        _Kind("add_spectral", "1 entry a row", sparse(1)),
        _Kind("add_kronecker", "near-square factors", kronecker(0)),
        _Kind("add_kronecker", "near-square factors, R of rank 16", kronecker(16)),
        _Kind("add_circulant", f"blocks of {load.block}", circulant(load.block)),
        _Kind("replace_outputs", "64 rows", output_rows(64), columns=64),
    )


def _correction(shapes: Shapes, step: AdapterStep, kind: _Kind, operands: Operands) -> Case:
    """At the attention's output projection."""
    _, in_size, (out_size,) = shapes.sites[1]
    segments = operands.segments(step.adapters, step.each, kronecker_inner(in_size, out_size))
    site = site_operands(operands, kind.make, in_size, (out_size,), segments)

    def run(backend: Backend) -> None:
        correct: Any = getattr(backend.deltas, kind.operation)
        correct(site.y, site.x, site.table, site.targets, site.segments)

    outputs = 2 * out_size if kind.columns is None else kind.columns
    moved = step.rows * (in_size + outputs) * site.x.itemsize
    work = Work(operands.taken_bytes + moved, kind.flops * step.rows * in_size * out_size)
    return Case(kind.operation, f"o, {kind.name}, {step.name}", run, work, (site.y,))
