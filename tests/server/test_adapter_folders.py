"""Which adapters a server starts with, and folders that change while it runs."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deltamux.adapters.errors import AdapterCorrupt
from deltamux.server.store.folders import Declared, DeclaredAdapters, DeclaredRefused
from deltamux.server.store.registry import AdapterRegistry
from deltamux.server.store.wanted import Wanted
from deltamux.server.tenants.tenant import OPERATOR

from .fake_engine import FakeEngine
from .fake_store import open_registry, write_adapter


@pytest.fixture
def engine(tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@asynccontextmanager
async def started(engine, state_dir: Path, declared: Declared):
    """A registry that has been opened, and what keeps it up to date."""
    with open_registry(state_dir, engine) as registry:
        await registry.open(declared.origins)
        yield registry, DeclaredAdapters(declared, registry)
        await registry.close()


def served(registry: AdapterRegistry) -> dict[str, str | None]:
    """Names and, where they are not served, why."""
    return {each.name: registry.error(each) for each in registry.catalog.all()}


def start(engine, state_dir, declared, check: Callable[[AdapterRegistry], object]) -> None:
    async def run() -> None:
        async with started(engine, state_dir, declared) as (registry, adapters):
            await adapters.register()
            check(registry)

    asyncio.run(run())


def test_a_folder_is_served_under_its_own_name_and_refused_ones_are_listed(engine, tmp_path):
    shelf = tmp_path / "shelf"
    good = write_adapter(tmp_path / "elsewhere" / "abc123", "linked")
    write_adapter(shelf / "plain", "plain")
    (shelf / "linked").symlink_to(good)
    write_adapter(shelf / "broken", "broken")
    write_adapter(shelf / "with space", "x")
    write_adapter(shelf / "base", "x")
    (write_adapter(shelf / "weights only", "x") / "adapter_config.json").unlink()
    (write_adapter(shelf / "config-only", "x") / "adapter_model.safetensors").unlink()
    (shelf / ".cache").mkdir()
    (shelf / "a file").touch()
    engine.bad_adapters = {"broken": AdapterCorrupt("planted")}

    def check(registry: AdapterRegistry) -> None:
        found = served(registry)
        reasons = {
            "broken": "planted",
            "with space": "no adapter name",
            "base": "name of the base",
            "weights only": "no adapter name",
            "config-only": "holds neither",
        }
        assert found.keys() == {"plain", "linked", *reasons}
        assert (found["plain"], found["linked"]) == (None, None)
        for name, reason in reasons.items():
            assert reason in found[name], name
        assert registry.catalog.get("linked").source == str(good)
        assert registry.catalog.resolve("base", OPERATOR) is None

    start(engine, tmp_path / "state", Declared(folders=[shelf]), check)


def test_a_named_adapter_wins_over_a_folder_of_that_name(engine, tmp_path):
    named = write_adapter(tmp_path / "elsewhere", "named")
    write_adapter(tmp_path / "shelf" / "a", "shelved")
    declared = Declared([("a", str(named))], [tmp_path / "shelf"])

    def check(registry: AdapterRegistry) -> None:
        assert registry.catalog.get("a").source == str(named)

    start(engine, tmp_path / "state", declared, check)
    assert list(engine.loaded.values()) == ["named"]


def test_a_named_adapter_is_of_the_source_this_start_names(engine, tmp_path):
    """Also where an earlier start named that source, and one between them another."""
    first, second = write_adapter(tmp_path / "1", "1"), write_adapter(tmp_path / "2", "2")
    for folder in (first, second, first):

        def check(registry: AdapterRegistry, folder: Path = folder) -> None:
            assert registry.catalog.get("a").default.source == str(folder)

        start(engine, tmp_path / "state", Declared([("a", str(folder))]), check)


def test_a_refused_named_adapter_stops_the_start(engine, tmp_path):
    write_adapter(tmp_path / "a", "a")
    engine.bad_adapters = {"a": AdapterCorrupt("planted")}
    declared = Declared([("mine", str(tmp_path / "a"))])
    with pytest.raises(DeclaredRefused, match=r"mine.*planted"):
        start(engine, tmp_path / "state", declared, lambda _: None)


def test_a_restart_reads_no_file_that_has_not_changed(engine, tmp_path, monkeypatch):
    for name in "abc":
        write_adapter(tmp_path / "shelf" / name, name)
    declared = Declared([("n", str(tmp_path / "shelf" / "a"))], [tmp_path / "shelf"])
    start(engine, tmp_path / "state", declared, lambda _: None)
    write_adapter(tmp_path / "shelf" / "b", "changed")
    engine.load_calls, seen = 0, {}
    start(engine, tmp_path / "state", declared, lambda _: None)
    assert engine.load_calls == 1
    with monkeypatch.context() as patch:
        patch.setattr("deltamux.adapters.folder.os.open", None)  # no adapter file can be opened
        start(engine, tmp_path / "state", declared, lambda registry: seen.update(served(registry)))
    assert engine.load_calls == 1
    assert seen == {"a": None, "b": None, "c": None, "n": None}


def test_what_is_declared_no_more_is_not_served_and_comes_back_as_it_was(engine, tmp_path):
    folder = write_adapter(tmp_path / "shelf" / "a", "one")
    declared = Declared(folders=[tmp_path / "shelf"])

    async def story() -> None:
        async with started(engine, tmp_path / "state", declared) as (registry, adapters):
            await adapters.register()
            write_adapter(folder, "two")
            await adapters.register()
            await registry.set_default("a", None)
            await registry.add(Wanted("mine", str(folder)))
            [old, new] = sorted(each.registered for each in registry.catalog.get("a").versions)
            assert old < new
        async with started(engine, tmp_path / "state", Declared()) as (registry, adapters):
            await adapters.register()
            assert served(registry) == {"mine": None}
        async with started(engine, tmp_path / "state", declared) as (registry, adapters):
            await adapters.register()
            chosen = registry.catalog.resolve("a", OPERATOR)
            assert chosen.version is chosen.adapter.versions[1], "still rolled back"

    asyncio.run(story())


def test_a_folder_that_vanished_while_no_server_ran_is_not_served(engine, tmp_path):
    folder = write_adapter(tmp_path / "shelf" / "a", "a")
    write_adapter(tmp_path / "shelf" / "b", "b")
    declared = Declared(folders=[tmp_path / "shelf"])
    start(engine, tmp_path / "state", declared, lambda _: None)
    shutil.rmtree(folder)

    def check(registry: AdapterRegistry) -> None:
        assert served(registry) == {"b": None}

    start(engine, tmp_path / "state", declared, check)


def test_a_registration_is_not_taken_over_by_a_folder(engine, tmp_path):
    write_adapter(tmp_path / "shelf" / "a", "shelved")
    mine = write_adapter(tmp_path / "mine", "mine")
    declared = Declared(folders=[tmp_path / "shelf"])

    async def story() -> None:
        async with started(engine, tmp_path / "state", declared) as (registry, adapters):
            await registry.add(Wanted("a", str(mine)))
            await adapters.register()
            assert registry.catalog.get("a").source == str(mine)

    asyncio.run(story())


async def until(holds: Callable[[], bool]) -> None:
    """Poll: the notice comes from the system."""
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.02)


def watched(engine, tmp_path, story: Callable[[AdapterRegistry, Path], Awaitable[None]]) -> None:
    shelf = tmp_path / "shelf"
    write_adapter(shelf / "first", "first")

    async def run() -> None:
        async with started(engine, tmp_path / "state", Declared(folders=[shelf])) as parts:
            registry, adapters = parts
            watching = asyncio.create_task(adapters.watch())
            await adapters.register()
            await story(registry, shelf)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(run())


def test_a_watched_folder_is_followed(engine, tmp_path):
    async def story(registry: AdapterRegistry, shelf: Path) -> None:
        write_adapter(shelf / "second", "second")
        await until(lambda: served(registry) == {"first": None, "second": None})
        before = registry.catalog.get("first").default_digest
        write_adapter(shelf / "first", "changed")
        await until(lambda: registry.catalog.get("first").default_digest != before)
        assert registry.catalog.get("first").earlier().digest == before
        shutil.rmtree(shelf / "second")
        await until(lambda: served(registry) == {"first": None})

    watched(engine, tmp_path, story)


def test_half_a_folder_is_refused_until_it_is_whole(engine, tmp_path):
    async def story(registry: AdapterRegistry, shelf: Path) -> None:
        weights = write_adapter(tmp_path / "whole", "late") / "adapter_model.safetensors"
        (shelf / "late").mkdir()
        shutil.copy(tmp_path / "whole" / "adapter_config.json", shelf / "late")
        await until(lambda: "late" in served(registry))
        assert "holds neither" in served(registry)["late"]
        shutil.copy(weights, shelf / "late")
        await until(lambda: served(registry)["late"] is None)

    watched(engine, tmp_path, story)
