"""Models that several test files share, made at most once per session."""

import os

# Before anything imports triton, which reads it once: kernels are interpreted in this process,
# unless it is there to run them on a GPU (tests/kernels/on_gpu.py).
if os.environ.get("DELTAMUX_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest
import torch

from deltamux.server.model.source import resolve_model

from .tiny_models import make_tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start servers come first: no worker is left alone with the last of them."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "running_server"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much where the machine is shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_state() -> Path:
    """A state folder that outlives the session, so that the demo base is converted once."""
    chosen = os.environ.get("DELTAMUX_TEST_STATE")
    folder = Path(chosen) if chosen else platformdirs.user_cache_path("deltamux-tests")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def demo_base(demo_state: Path) -> Path:
    """The demo base as a Hugging Face folder."""
    return resolve_model("smollm2", demo_state)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_tiny`` with a cache: equal arguments give the same folder, to be left unchanged."""
    made: dict[str, Path] = {}

    def make(family: str, **arguments: object) -> Path:
        key = repr((family, sorted(arguments.items())))
        if key not in made:
            made[key] = make_tiny(family, tmp_path_factory.mktemp(family), **arguments)
        return made[key]

    return make
