import os
import sys
from collections.abc import Iterator

import pytest
import torch

from deltamux.kernels.backend import Backend, compiled_backend, reference_backend
from deltamux.kernels.gpu.backend import triton_backend

from .on_gpu import DEVICE, ON_GPU, all_moved


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU only what runs its kernels: the rest neither needs one nor an interpreter."""
    if ON_GPU:
        config.hook.pytest_deselected(items=[each for each in items if not runs_kernels(each)])
        items[:] = [each for each in items if runs_kernels(each)]


def runs_kernels(item: pytest.Item) -> bool:
    """Whether a test takes ``interpreted``, by its name or as a parameter."""
    assert isinstance(item, pytest.Function)
    parameters = item.callspec.id if hasattr(item, "callspec") else ""
    return "interpreted" in item.fixturenames or "interpreted" in parameters


@pytest.fixture(autouse=True)
def working_device() -> Iterator[None]:
    """On a GPU: a test that broke the process's CUDA context ends it, and xdist starts another."""
    yield
    if not ON_GPU:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{os.environ.get('PYTEST_CURRENT_TEST')}: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.fixture(scope="session")
def compiled() -> Backend:
    return compiled_backend()


@pytest.fixture(scope="session")
def reference() -> Backend:
    return reference_backend()


@pytest.fixture(scope="session")
def interpreted() -> Backend:
    """The GPU's kernels under Triton's interpreter, or on a GPU where these are its tests."""
    backend = triton_backend({})
    return all_moved(backend, DEVICE) if ON_GPU else backend


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
