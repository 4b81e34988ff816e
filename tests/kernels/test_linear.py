"""The base's products against the float32 formula, on the matrix unit and without it."""

import pytest
import torch
from torch import Tensor

from deltamux.kernels.linear.compiled import CompiledLinear, _PackedLinear
from deltamux.kernels.linear.op import PrepareLinear
from deltamux.kernels.tables import SiteTargets

from .compare import same_bits
from .pools import NAN, num_threads, strided_rows


@pytest.fixture(params=["best", "no-matrix-unit"])
def prepare_linear(compiled, request, monkeypatch) -> PrepareLinear:
    """As this processor does it, and as one without a matrix unit does."""
    own: CompiledLinear = compiled.prepare_linear.__self__
    if request.param != "best":
        monkeypatch.setattr(own, "has_matrix_unit", False)
    return own.prepare_linear


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("out_size", "in_size"), [(1, 8), (60, 33), (192, 64), (300, 96), (17, 31), (33, 1000)]
)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 63, 300])
def test_packed_equals_the_formula(prepare_linear, dtype, rows, out_size, in_size, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight, c = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, in_size), (out_size, in_size), (out_size,))
    )
    y = prepare_linear(weight, c if bias else None)(x)
    expected = x.double() @ weight.double().T + (c.double() if bias else 0)
    assert y.dtype is dtype
    assert y.is_contiguous()
    # One rounding of the result, beside float32's errors of summation.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(64, 32, 96), (7, 30, 5), (1, 1, 70), (40,)])
@pytest.mark.parametrize("rows", [1, 16, 40, 300])
def test_every_targets_columns_are_of_its_own_input(prepare_linear, dtype, rows, sizes, bias):
    weight = drawn(sum(sizes), 48, dtype=dtype)
    linear = prepare_linear(weight, drawn(sum(sizes), dtype=dtype, seed=1) if bias else None)
    inputs = drawn(rows, 48, dtype=dtype, seed=2).repeat(len(sizes), 1, 1)
    changed = torch.arange(rows)[rows // 3 :: 2]
    for target, own in enumerate(inputs):
        own[changed] = drawn(len(changed), 48, dtype=dtype, seed=3 + target)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    targets = SiteTargets(5, tuple(starts[:-1]), tuple(sizes))
    with num_threads(2):
        y = linear.per_target(inputs, changed, targets)
    assert y.shape == (rows, sum(sizes))
    assert y.dtype is dtype
    for own, start, end in zip(inputs, starts[:-1], starts[1:], strict=True):
        expected = linear(own)[:, start:end]
        # Each is rounded once.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(y[:, start:end], expected, rtol=tolerance, atol=1e-4)
        if isinstance(linear, _PackedLinear):
            assert same_bits(y[:, start:end], expected)


@pytest.mark.parametrize("in_size", [64, 60])
def test_a_row_has_the_same_bits_alone_and_in_any_company(prepare_linear, in_size):
    linear = prepare_linear(drawn(100, in_size, dtype=torch.bfloat16), None)
    x = drawn(70, in_size, dtype=torch.bfloat16, seed=1)
    with num_threads(2):
        together = linear(x)
    for row in (0, 15, 16, 31, 32, 63, 64, 69):
        assert same_bits(linear(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("in_size", [64, 60])
def test_a_nan_stays_in_its_row(prepare_linear, in_size):
    """Rows beside x are NaN too: nothing beyond a row's end is multiplied."""
    linear = prepare_linear(drawn(40, in_size, dtype=torch.bfloat16), None)
    x = strided_rows(21, in_size, torch.bfloat16, torch.Generator().manual_seed(2)).contiguous()
    x[4, 7] = NAN
    assert linear(x).isnan().any(1).tolist() == [row == 4 for row in range(21)]
