import pytest
import torch

from deltamux.kernels.backend import Backend, compiled_backend, reference_backend
from deltamux.kernels.gpu.backend import triton_backend


@pytest.fixture(scope="session")
def compiled() -> Backend:
    return compiled_backend()


@pytest.fixture(scope="session")
def reference() -> Backend:
    return reference_backend()


@pytest.fixture(scope="session")
def interpreted() -> Backend:
    """The GPU's kernels under Triton's interpreter."""
    return triton_backend({})


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
