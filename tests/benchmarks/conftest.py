"""A scripted server that the load generator's tests share."""

from collections.abc import Iterator

import pytest

from .fake_openai import FakeServer, fake_server


@pytest.fixture(scope="session")
def running_fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def server(running_fake: FakeServer) -> FakeServer:
    """As it comes, and asked nothing yet."""
    running_fake.reset()
    return running_fake
