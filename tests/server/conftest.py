"""The HTTP application on a fake engine, as most tests of the API want it."""

from collections.abc import Iterator

import openai
import pytest

from deltamux.server.text.tokenizer import Tokenizer

from .fake_engine import Running, byte_level_tokenizer, serving


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    with serving(tokenizer) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
