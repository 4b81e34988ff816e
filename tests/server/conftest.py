"""The HTTP application on a fake engine, as most tests of the API want it."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from deltamux.server.text.tokenizer import Tokenizer

from .fake_engine import Running, byte_level_tokenizer, serving
from .fake_store import write_adapter


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    with serving(tokenizer, keep_versions=1) as running:
        yield running


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapter folders at relative paths, each named by its label."""
    monkeypatch.chdir(tmp_path)
    for label in ("some/path", *"abpq", "old", "new", "good", "ia3", "prefix", "unshifted"):
        write_adapter(tmp_path / label, label)
    return tmp_path


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
