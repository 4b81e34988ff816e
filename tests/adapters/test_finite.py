"""Numbers only, or not: also where the sum of numbers is none."""

import pytest
import torch

from deltamux.adapters.finite import all_finite

LARGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([1.0, -2.0], True),
        ([float("nan"), 1.0], False),
        ([1.0, float("inf")], False),
        ([float("-inf"), float("inf")], False),
    ],
)
def test_nan_and_inf_are_found(dtype: torch.dtype, values: list[float], finite: bool) -> None:
    assert all_finite(torch.tensor(values, dtype=dtype)) is finite


def test_numbers_whose_sum_overflows_are_numbers() -> None:
    assert all_finite(torch.full((7,), LARGE))
    assert not all_finite(torch.tensor([LARGE, LARGE, float("inf")]))
