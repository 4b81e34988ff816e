"""The reference of the row corrections and the GPU's against torch and transformers."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltamux.kernels.backend import Backend
from deltamux.kernels.bottleneck.op import Activation, Source

from .compare import same_bits
from .row_cases import (
    ACT_NAMES,
    EPS,
    GROUPS,
    PLACE,
    VOCAB,
    Case,
    bottleneck_case,
    embedding_case,
    norm_case,
    numbers,
    rows_case,
    side_case,
)


@pytest.fixture(params=["reference", "interpreted"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.getfixturevalue(request.param)


def each_group(case: Case) -> Iterator[tuple[slice, tuple[int, ...], float]]:
    """Rows, cell and weight of every group with a cell."""
    for start, end, slot, weight in GROUPS:
        cell = tuple(case.table.cells[PLACE, slot].tolist())
        if start < end and cell[0] >= 0:
            yield slice(start, end), cell, weight


@pytest.mark.parametrize("source", Source)
@pytest.mark.parametrize(("activation", "name"), ACT_NAMES)
def test_reference_bottleneck_is_two_linears_with_transformers_activation(
    reference: Backend, activation: Activation, name: str, source: Source
) -> None:
    case = bottleneck_case(torch.float32, 33, 7, activation, source)
    expected = case.out.clone()
    h, r = case.inputs
    z = {Source.OUTPUT: h, Source.RESIDUAL: r, Source.SUM: h + r}[source]
    for rows, cell, weight in each_group(case):
        width, _, _, down, up, down_bias, up_bias = cell
        d = numbers(case, down_bias, width) if down_bias >= 0 else None
        u = numbers(case, up_bias, 33) if up_bias >= 0 else None
        inner = functional.linear(z[rows], numbers(case, down, width, 33), d)
        outer = functional.linear(ACT2FN[name](inner), numbers(case, up, width, 33).T, u)
        expected[rows] += weight * outer
    torch.testing.assert_close(case.run(reference), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_side_attention_is_torchs(backend: Backend, heads: int, kv_heads: int) -> None:
    case = side_case(torch.float32, heads, kv_heads)
    expected = case.out.clone()
    for rows, (length, *offsets), weight in each_group(case):
        keys, values = (numbers(case, offset, kv_heads, length, 20) for offset in offsets)
        attended = functional.scaled_dot_product_attention(
            case.inputs[0][rows].transpose(0, 1), keys, values, enable_gqa=True
        )
        expected[rows] += weight * attended.transpose(0, 1)
    torch.testing.assert_close(case.run(backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_is_transformers_and_torchs(
    backend: Backend, dtype: torch.dtype, centered: bool, bias: bool
) -> None:
    case = norm_case(dtype, (33,), centered, bias)
    expected = case.out.clone()
    for rows, (weight, bias_at), _ in each_group(case):
        g = numbers(case, weight, 33)
        b = numbers(case, bias_at, 33) if bias else torch.zeros(33, dtype=dtype)
        if centered:
            norm = torch.nn.LayerNorm(33, EPS, dtype=dtype)
            norm.load_state_dict({"weight": g, "bias": b})
            expected[rows] = norm(case.inputs[0][rows]).detach()
        else:
            rms = LlamaRMSNorm(33, EPS).to(dtype)
            rms.load_state_dict({"weight": g})
            expected[rows] = rms(case.inputs[0][rows]).detach() + b
    torch.testing.assert_close(case.run(backend), expected, rtol=1e-6, atol=1e-6)


def test_rows_are_an_embedding_with_other_rows(backend: Backend, dtype: torch.dtype) -> None:
    case = rows_case(dtype)
    table = torch.randn(VOCAB, 33).to(dtype)
    case = replace(case, out=functional.embedding(case.inputs[0], table))
    expected = case.out.clone()
    for rows, (count, at, ids), _ in each_group(case):
        changed = table.clone()
        which = case.table.indices[ids : ids + count].long() if ids >= 0 else slice(None)
        changed[which] = numbers(case, at, count, 33)
        expected[rows] = functional.embedding(case.inputs[0][rows], changed)
    assert same_bits(case.run(backend), expected)


def test_correction_is_a_low_rank_change_of_the_whole_embedding(
    backend: Backend,
) -> None:
    case = embedding_case(torch.float32)
    table = torch.randn(VOCAB, 33)
    case = replace(case, out=functional.embedding(case.inputs[0], table))
    expected = case.out.clone()
    for rows, (rank, _, a, b, scale), weight in each_group(case):
        changed = table * (numbers(case, scale, 33) if scale >= 0 else 1.0)
        if rank:
            changed += weight * numbers(case, a, VOCAB, rank) @ numbers(case, b, rank, 33)
        expected[rows] = functional.embedding(case.inputs[0][rows], changed)
    torch.testing.assert_close(case.run(backend), expected, rtol=1e-5, atol=1e-5)
