"""What the store may take of the disk: refused by name where it is full, given back where not."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deltamux.adapters.errors import AdapterCorrupt
from deltamux.server.store.budget import DiskBudget
from deltamux.server.store.errors import RegistryError, StoreFull
from deltamux.server.store.leases import ModelChoice
from deltamux.server.store.registry import AdapterRegistry, Wanted
from deltamux.server.tenants.tenant import OPERATOR

from .fake_engine import FakeEngine
from .fake_store import files_in, open_registry, write_adapter
from .running import running_server
from .siege import eventually


@pytest.fixture
def engine(tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@contextlib.asynccontextmanager
async def opened(
    engine: FakeEngine, tmp_path: Path, budget: int | None, **options
) -> AsyncIterator[AdapterRegistry]:
    with open_registry(tmp_path / "state", engine, store_budget=budget, **options) as registry:
        await registry.open()
        yield registry
        await registry.close()


def size_of_one(tmp_path: Path) -> int:
    """All adapters here are of this size."""
    folder = write_adapter(tmp_path / "one", "x")
    return sum(file.stat().st_size for file in folder.iterdir())


def on_disk(tmp_path: Path) -> int:
    files = (tmp_path / "state" / "adapters" / "contents").rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


async def add(registry: AdapterRegistry, tmp_path: Path, name: str, label: str = "") -> None:
    folder = write_adapter(tmp_path / name, label or name)
    await registry.add(Wanted(name, str(folder), replace=True))


def test_a_full_store_refuses_by_name_and_has_room_again_after_a_removal(engine, tmp_path):
    size = size_of_one(tmp_path)

    async def story() -> None:
        async with opened(engine, tmp_path, 2 * size + 1) as registry:
            await add(registry, tmp_path, "a")
            await add(registry, tmp_path, "b")
            said = f"{size} bytes more: the store has {2 * size} of the {2 * size + 1} that --store"
            with pytest.raises(StoreFull, match=said):
                await add(registry, tmp_path, "c")
            assert registry.catalog.find("c") is None
            await add(registry, tmp_path, "copy-of-a", "a")  # shares what is there
            await registry.remove("b")
            await add(registry, tmp_path, "c")
            assert registry.store_bytes == on_disk(tmp_path) == 2 * size

    asyncio.run(story())


def test_what_was_refused_or_given_up_counts_no_more(engine, tmp_path):
    size = size_of_one(tmp_path)
    engine.bad_adapters["z"] = AdapterCorrupt("bad")

    async def story() -> None:
        async with opened(engine, tmp_path, 2 * size, keep_versions=1) as registry:
            for label in "abc":  # each pushes out the version before
                await add(registry, tmp_path, "a", label)
            for _ in range(3):
                with pytest.raises(AdapterCorrupt):
                    await add(registry, tmp_path, "b", "z")
            await add(registry, tmp_path, "b")
            assert registry.store_bytes == on_disk(tmp_path) == 2 * size

    asyncio.run(story())


def test_what_a_request_uses_is_not_collected_to_make_room(engine, tmp_path):
    size = size_of_one(tmp_path)

    async def story() -> None:
        async with opened(engine, tmp_path, size, keep_versions=1) as registry:
            await add(registry, tmp_path, "a")
            async with registry.leases.lease(ModelChoice("a", OPERATOR)):
                await registry.remove("a")
                with pytest.raises(StoreFull):
                    await add(registry, tmp_path, "b")
            await add(registry, tmp_path, "b")

    asyncio.run(story())


def test_a_restart_counts_what_is_there_and_a_lower_budget_keeps_it(engine, tmp_path):
    size = size_of_one(tmp_path)

    async def first() -> None:
        async with opened(engine, tmp_path, None) as registry:
            for name in "abc":
                await add(registry, tmp_path, name)

    async def second() -> None:
        async with opened(engine, tmp_path, 2 * size) as registry:
            assert (registry.store_bytes, len(registry.catalog)) == (3 * size, 3)
            with pytest.raises(StoreFull):
                await add(registry, tmp_path, "d")
            await registry.remove("a")
            await registry.remove("b")
            await add(registry, tmp_path, "d")

    asyncio.run(first())
    asyncio.run(second())


def test_at_once_no_more_come_in_than_fit(engine, tmp_path):
    size = size_of_one(tmp_path)

    async def story() -> None:
        async with opened(engine, tmp_path, 3 * size) as registry:
            arriving = (add(registry, tmp_path, name) for name in "abcdefgh")
            results = await asyncio.gather(*arriving, return_exceptions=True)
            assert [type(each) for each in results if each] == [StoreFull] * 5
            assert registry.store_bytes == 3 * size == on_disk(tmp_path)

    asyncio.run(story())


def test_adapters_that_stay_where_they_are_take_nothing(engine, tmp_path):
    async def story() -> None:
        async with opened(engine, tmp_path, 1, copy_local=False) as registry:
            await add(registry, tmp_path, "a")
            assert registry.store_bytes == 0

    asyncio.run(story())


def test_a_budget_counts_a_content_once():
    budget = DiskBudget(10)
    budget.reserve("a", 6)
    budget.reserve("a", 6)
    budget.count({"a": 4})
    assert (budget.taken, budget.digests) == (4, {"a"})
    with pytest.raises(RegistryError):
        budget.reserve("b", 7)
    budget.release("nobody")
    budget.release("a")
    assert budget.taken == 0


def test_a_server_ends_while_a_source_does_not_answer(tiny_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = ["--adapter-source", source, "--memory-budget", "16MiB", "--kernels", "reference"]
        log = tmp_path / "log"
        with running_server(tiny_model("llama"), *options, log=log, **os.environ) as server:
            body = {"name": "slow", "source": f"{source}/adapter", "wait": False}
            assert httpx.post(f"{server.url}/v1/adapters", json=body).status_code == 202
            url = f"{server.url}/v1/adapters/slow"
            eventually(lambda: httpx.get(url).json()["state"] == "fetching")
            connection, _ = silent.accept()  # from now on it waits for an answer
            server.process.terminate()
            assert server.process.wait(timeout=20) == 0
            connection.close()
    assert files_in(tmp_path / "state" / "adapters" / "staging") == []
    assert "fetches under way are given up" in log.read_text()
