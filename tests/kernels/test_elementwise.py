"""rms_norm, rotary, silu_mul and others against their formulas, on strided and odd shapes."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from deltamux.kernels.backend import Backend

from .compare import assert_close, same_bits

NAN = float("nan")
SHAPES = [(1, 576), (16, 576), (63, 60), (2, 1), (3, 17), (100, 1536)]


@pytest.fixture(
    params=[("compiled", 1), ("compiled", 2), ("interpreted", 1)],
    ids=["compiled", "compiled-2-threads", "interpreted"],
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # The interpreter computes by numpy, which would warn of infinities and NaN.
    with np.errstate(all="ignore"):
        yield request.getfixturevalue(name)
    torch.set_num_threads(before)


def few(backend: Backend, rows: int, size: int) -> int:
    """So many rows, fewer wide ones for the interpreter, which needs milliseconds for a program."""
    return rows if backend.name == "compiled" else min(rows, (1 << 15) // size)


def strided(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A view of this shape inside a wider buffer full of NaN, and that buffer."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.full((shape[0], shape[1] + 5, *shape[2:]), NAN, dtype=dtype)
    view = wide[:, 3 : 3 + shape[1]]
    view.copy_(torch.randn(shape, generator=rng) * 3)
    return view, wide


def llama_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = LlamaRMSNorm(x.shape[-1], eps)
    norm.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return norm(x)


def assert_within_two_roundings(actual: Tensor, expected: Tensor) -> None:
    """The norm rounds twice: a 16-bit value may differ by one unit where the first one ties."""
    exponent = 2e-6 if actual.dtype is torch.float32 else torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=exponent, atol=1e-30)


@pytest.mark.parametrize("shape", [*SHAPES, (7, 3, 64), (5, 9, 60)])
def test_rms_norm_is_llamas(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, _ = strided((few(backend, shape[0], shape[-1]), *shape[1:]), dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    y = backend.rms_norm(x, weight, 1e-5)
    assert y.is_contiguous()
    assert_within_two_roundings(y, llama_norm(x, weight, 1e-5))


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_updates_the_residual(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    shape = few(backend, *shape), shape[1]
    x, _ = strided(shape, dtype)
    residual, around = strided(shape, dtype, seed=1)
    expected, poison = residual + x, around.clone()
    weight = torch.randn(shape[-1]).to(dtype)
    y = backend.add_rms_norm(x, residual, weight, 1e-5)
    assert same_bits(residual, expected)
    assert same_bits(y, backend.rms_norm(expected, weight, 1e-5))
    poison[:, 3 : 3 + shape[1]] = expected
    assert same_bits(around, poison)


@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 9, 64), (63, 3, 60), (300, 9, 128)])
def test_rotary_is_llamas(
    backend: Backend, dtype: torch.dtype, rows: int, heads: int, head_dim: int
) -> None:
    rows = few(backend, rows, heads * head_dim)
    query, around = strided((rows, heads, head_dim), dtype)
    key, _ = strided((rows, 1, head_dim), dtype, seed=1)
    angle = torch.rand(rows, head_dim // 2) * 6
    exact = apply_rotary_pos_emb(
        query.float(), key.float(), angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    )
    magnitude = 2 * max(query.abs().max(), key.abs().max())
    poison = around.clone()
    backend.rotary(query, key, angle.cos(), angle.sin())
    for actual, expected in zip((query, key), exact, strict=True):
        assert_close(actual, expected, magnitude)
    poison[:, 3 : 3 + heads] = query
    assert same_bits(around, poison)


@pytest.mark.parametrize(("rows", "size"), [(1, 1536), (16, 1536), (63, 60), (3, 1), (40, 9001)])
def test_silu_mul(
    backend: Backend, reference: Backend, dtype: torch.dtype, rows: int, size: int
) -> None:
    gate_up, _ = strided((few(backend, rows, size), 2 * size), dtype)
    exact = reference.silu_mul(gate_up.float())
    assert_close(backend.silu_mul(gate_up), exact)


def test_silu_mul_at_its_limits(backend: Backend, dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 3e38, -3e38, 80.0, -80.0, -90.0])
    y = backend.silu_mul(torch.cat((gate, torch.ones(9))).to(dtype)[None])[0].float()
    expected = torch.nn.functional.silu(gate.to(dtype).float())
    torch.testing.assert_close(y, expected, rtol=2.0**-8, atol=1e-36)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 300])
@pytest.mark.parametrize("size", [1, 60, 577])
def test_gathered_rows_are_the_tables(
    compiled: Backend, reference: Backend, dtype: torch.dtype, rows: int, size: int
) -> None:
    table = torch.randn(41, size).to(dtype)
    indices = torch.randint(41, (rows,))
    for backend in (compiled, reference):
        assert same_bits(backend.gather_rows(table, indices), table[indices])


@pytest.mark.parametrize("index", [-1, 41])
def test_rows_that_are_not_there_are_refused(
    compiled: Backend, reference: Backend, index: int
) -> None:
    for backend in (compiled, reference):
        with pytest.raises(IndexError):
            backend.gather_rows(torch.ones(41, 3), torch.tensor([0, index, 2]))
    with pytest.raises(ValueError, match="indices must be a contiguous"):
        compiled.gather_rows(torch.ones(41, 3), torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="a table must be a contiguous"):
        compiled.gather_rows(torch.ones(3, 41).T, torch.tensor([0]))


def awkward_rows(kind: str, rows: int, size: int) -> Tensor:
    """Rows with ties, with NaN, with infinities, or that rise from number to number."""
    rng = torch.Generator().manual_seed(size)
    x = torch.randn(rows, size, generator=rng)
    places = torch.randint(size, (rows, 3), generator=rng)
    match kind:
        case "ties":
            return (x * 2).round()
        case "zeros":
            return torch.where(x > 0, 0.0, -0.0)
        case "nan":
            return x.scatter(1, places, NAN).scatter(1, places[:, :1], float("inf"))
        case "infinite":
            return x.scatter(1, places, float("inf"))
        case "masked":
            return torch.full_like(x, -float("inf"))
    return x.sort(-1).values


@pytest.mark.parametrize("kind", ["ties", "zeros", "nan", "infinite", "masked", "rising"])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize("size", [1, 5, 127, 129, 5003, 40_001])
def test_the_largest_is_torchs(
    compiled: Backend, reference: Backend, kind: str, rows: int, size: int
) -> None:
    wide = torch.full((rows, size + 2), NAN)
    x = wide[:, 1:-1].copy_(awkward_rows(kind, rows, size))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for backend in (compiled, reference):
            values, indices = x.max(-1)
            expected = [
                index if math.isfinite(value) else -1
                for value, index in zip(values.tolist(), indices.tolist(), strict=True)
            ]
            assert backend.largest(x).tolist() == expected
    torch.set_num_threads(before)
    for row, index in zip(x, expected, strict=True):
        assert index == -1 or index == (row == row.max()).nonzero()[0], "the first one"


def test_there_is_no_largest_of_nothing(compiled: Backend, reference: Backend) -> None:
    for backend in (compiled, reference):
        with pytest.raises(IndexError):
            backend.largest(torch.ones(2, 0))
    for wrong in (torch.ones(2, 3).double(), torch.ones(3, 2).T):
        with pytest.raises(ValueError, match="expected float32"):
            compiled.largest(wrong)


def test_float16(interpreted: Backend, reference: Backend) -> None:
    """On a GPU only: against the reference in float32, within the roundings of either."""
    half = torch.float16
    x, _ = strided((5, 60), half)
    residual, _ = strided((5, 60), half, seed=1)
    weight, gate_up = torch.randn(60).to(half), strided((5, 66), half)[0]
    total = residual + x
    added = interpreted.add_rms_norm(x, residual, weight, 1e-5)
    assert same_bits(residual, total)
    assert_within_two_roundings(added, reference.rms_norm(total, weight, 1e-5))
    assert_within_two_roundings(interpreted.silu_mul(gate_up), reference.silu_mul(gate_up))
    query, key, angle = x.view(5, 3, 20), total.view(5, 3, 20), torch.rand(5, 10)
    expected = query.clone(), key.clone()
    reference.rotary(*expected, angle.cos(), angle.sin())
    query, key = query.clone(), key.clone()
    interpreted.rotary(query, key, angle.cos(), angle.sin())
    for actual, exact in zip((query, key), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=2.0**-10, atol=1e-4)


def test_nan_and_infinity_come_through(backend: Backend, dtype: torch.dtype) -> None:
    for value in (NAN, float("inf")):
        x = torch.ones(3, 40, dtype=dtype)
        x[1, 5] = value
        assert backend.rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)[1].isnan().any()
        y = backend.silu_mul(x)
        assert not y[1].isfinite().all()
        assert y[[0, 2]].isfinite().all()


def test_wrong_shapes_are_refused(backend: Backend) -> None:
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match="weight does not fit"):
        backend.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="do not fit together"):
        backend.add_rms_norm(x, torch.ones(2, 8), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="differ in width"):
        backend.silu_mul(torch.ones(3, 7))
    with pytest.raises(ValueError, match="cos and sin"):
        backend.rotary(x[:, None], x[:, None], torch.ones(3, 4).double(), torch.ones(3, 4))
    with pytest.raises(ValueError, match="do not fit together"):
        backend.rotary(x[:, None], x[:, None], torch.ones(3, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="expected torch"):
        backend.rms_norm(x, torch.ones(8).bfloat16(), 1e-5)
