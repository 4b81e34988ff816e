"""Packed products against the float32 formula."""

import pytest
import torch


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out_size", "in_size"), [(1, 8), (60, 33), (192, 64), (300, 96)])
@pytest.mark.parametrize("rows", [1, 2, 17, 63, 300])
def test_packed_equals_the_formula(compiled, dtype, rows, out_size, in_size, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight, c = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, in_size), (out_size, in_size), (out_size,))
    )
    y = compiled.prepare_linear(weight, c if bias else None)(x)
    expected = x.double() @ weight.double().T + (c.double() if bias else 0)
    assert y.dtype is dtype
    assert y.is_contiguous()
    # One rounding of the result, beside float32's errors of summation.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-4)
