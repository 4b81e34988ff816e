"""The registry over a real database and real files; its engine notes what it is told."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from deltamux.adapters.errors import AdapterCorrupt
from deltamux.adapters.folder import hash_folder
from deltamux.server.composition import Room
from deltamux.server.engine.errors import EngineDied, EngineUnavailable
from deltamux.server.state.database import DATABASE_FILE, StateError, open_database
from deltamux.server.state.schema import metadata
from deltamux.server.store.backoff import Backoff
from deltamux.server.store.errors import (
    AdapterUnavailable,
    AlreadyLoaded,
    DigestMismatch,
    NameRefused,
    PinRefused,
    UnknownAdapter,
    VersionRefused,
)
from deltamux.server.store.leases import ModelChoice
from deltamux.server.store.registry import AdapterRegistry
from deltamux.server.store.wanted import Wanted
from deltamux.server.tenants.tenant import OPERATOR

from .fake_engine import FakeEngine
from .fake_store import files_in, open_registry, write_adapter

Story = Callable[[AdapterRegistry], Awaitable[None]]


@pytest.fixture
def engine(tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture
def tell(engine, tmp_path) -> Callable[..., None]:
    """Run a story on a registry; another is told on what the one before left."""

    def run(story: Story, **options) -> None:
        async def whole() -> None:
            async with opened(engine, tmp_path, **options) as registry:
                await story(registry)

        asyncio.run(whole())

    return run


@asynccontextmanager
async def opened(engine, tmp_path: Path, **options):
    with open_registry(tmp_path / "state", engine, **options) as registry:
        await registry.open()
        yield registry
        await registry.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


def contents(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "state" / "adapters" / "contents").iterdir()}


def staging(tmp_path: Path) -> list[str]:
    return files_in(tmp_path / "state" / "adapters" / "staging")


def wanted(name: str, path: Path, label: str = "", **more) -> Wanted:
    return Wanted(name, str(write_adapter(path, label) if label else path), **more)


async def used_label(registry: AdapterRegistry, engine: FakeEngine, model: str) -> str:
    async with registry.leases.lease(ModelChoice(model, OPERATOR)) as [adapter]:
        return engine.loaded[adapter.adapter_id]


def test_a_changed_folder_is_a_new_version_and_the_old_one_can_be_gone_back_to(
    tell, engine, tmp_path
):
    folder = tmp_path / "a"

    async def story(registry: AdapterRegistry) -> None:
        first = await registry.add(wanted("a", folder, "one"))
        with pytest.raises(AlreadyLoaded):
            await registry.add(wanted("a", folder, "two"))
        second = await registry.add(wanted("a", folder, "two", replace=True))
        one, two = first.default_digest, second.default_digest
        assert (one == two, [each.digest for each in second.versions]) == (False, [two, one])
        for model, label in (("a", "two"), (f"a@{one[:8]}", "one"), (f"base:a@{two}", "two")):
            assert await used_label(registry, engine, model) == label

        assert (await registry.set_default("a", None)).default_digest == one
        assert await used_label(registry, engine, "a") == "one"
        with pytest.raises(VersionRefused, match="no earlier version"):
            await registry.set_default("a", None)
        assert (await registry.set_default("a", two[:10])).default_digest == two
        with pytest.raises(VersionRefused, match="no version"):
            await registry.set_default("a", "ffffffffffff")
        with pytest.raises(UnknownAdapter):
            await registry.set_default("b", None)
        again = await registry.add(wanted("a", folder, "one", replace=True))
        assert [each.digest for each in again.versions] == [one, two], "known files, newest again"

    tell(story)


def test_only_the_newest_versions_are_kept_and_what_a_request_uses(tell, engine, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        await registry.add(wanted("a", tmp_path / "a", "0"))
        async with registry.leases.lease(ModelChoice("a", OPERATOR)) as [held]:
            for label in "1234":
                await registry.add(wanted("a", tmp_path / "a", label, replace=True))
            assert sorted(engine.loaded.values()) == ["0", "2", "3", "4"]
            assert engine.loaded[held.adapter_id] == "0"
            assert len(contents(tmp_path)) == 4
        await until(lambda: sorted(engine.loaded.values()) == ["2", "3", "4"])
        await until(lambda: len(contents(tmp_path)) == 3)
        kept = {each.digest for each in registry.catalog.get("a").versions}
        assert contents(tmp_path) == kept
        await registry.remove("a")
        assert (engine.loaded, contents(tmp_path)) == ({}, set())
        assert registry.residents.digests(range(100)) == []

    tell(story, keep_versions=3)


def test_the_default_is_kept_however_old_it_is(tell, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        for label in "012":
            await registry.add(wanted("a", tmp_path / "a", label, replace=True))
        oldest = registry.catalog.get("a").versions[-1].digest
        await registry.set_default("a", oldest)
        assert registry.catalog.get("a").version(oldest) is not None

    tell(story, keep_versions=3)


def test_two_names_share_one_content(tell, engine, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        await registry.add(wanted("a", tmp_path / "a", "same"))
        await registry.add(wanted("b", tmp_path / "b", "same"))
        assert (engine.load_calls, len(contents(tmp_path))) == (1, 1)
        await registry.remove("a")
        assert await used_label(registry, engine, "b") == "same"
        assert (engine.unloaded, len(contents(tmp_path))) == ([], 1)
        await registry.remove("b")
        assert (len(engine.unloaded), contents(tmp_path)) == (1, set())

    tell(story)


def test_everything_survives_a_restart_and_the_engine_is_told_nothing(tell, engine, tmp_path):
    async def first(registry: AdapterRegistry) -> None:
        for label in "12":
            await registry.add(wanted("a", tmp_path / "a", label, replace=True))
        await registry.set_default("a", None)
        await registry.add(wanted("b", tmp_path / "b", "b"))
        await registry.set_pinned("b", True, Room(1 << 20, 1 << 20, 4))
        await registry.add(wanted("gone", tmp_path / "c", "c"))
        await registry.remove("gone")
        assert await used_label(registry, engine, "a") == "1"
        before.extend(registry.catalog.all())
        usage.append(registry.leases.usage["a"])

    async def second(registry: AdapterRegistry) -> None:
        assert registry.catalog.all() == before
        assert registry.leases.usage["a"] == usage[0]
        await until(lambda: list(engine.loaded.values()) == ["b"])  # it is pinned
        assert engine.pins == [(next(iter(engine.loaded)), True)]
        assert await used_label(registry, engine, "a") == "1"
        assert len(engine.loaded) == 2

    before, usage = [], []
    tell(first)
    shutil.rmtree(tmp_path / "a")  # the store has its own copy
    engine.loaded, engine.load_calls, engine.pins = {}, 0, []
    tell(second)


def test_another_base_has_other_adapters_and_shares_files(tell, engine, tmp_path):
    async def one(registry: AdapterRegistry) -> None:
        await registry.add(wanted("a", tmp_path / "a", "same"))

    async def other(registry: AdapterRegistry) -> None:
        assert registry.catalog.all() == []
        await registry.add(wanted("b", tmp_path / "a"))
        await registry.remove("b")
        assert len(contents(tmp_path)) == 1, "the first base's adapter still needs it"

    tell(one)
    tell(other, base="other")


def test_a_version_in_place_is_gone_when_its_files_change(tell, engine, tmp_path):
    folder = tmp_path / "a"

    async def story(registry: AdapterRegistry) -> None:
        first = await registry.add(wanted("a", folder, "one"))
        assert (contents(tmp_path), first.default.path) == (set(), str(folder))
        await registry.add(wanted("a", folder, "two", replace=True))
        registry.residents.engine_down()
        assert await used_label(registry, engine, "a") == "two"
        with pytest.raises(AdapterUnavailable, match="changed"):
            await registry.set_default("a", None)
        assert await used_label(registry, engine, "a") == "two"

    tell(story, copy_local=False)


@pytest.mark.parametrize("error", [AdapterCorrupt("bad"), EngineUnavailable("down")])
def test_a_refused_adapter_changes_nothing_and_leaves_nothing(error, tell, engine, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        kept = await registry.add(wanted("a", tmp_path / "a", "good"))
        on_disk = contents(tmp_path)
        write_adapter(tmp_path / "a", "bad")
        if isinstance(error, AdapterCorrupt):
            engine.bad_adapters["bad"] = error
        else:
            engine.refusal = error
        for name, replace in (("a", True), ("b", False)):
            with pytest.raises(type(error)):
                await registry.add(wanted(name, tmp_path / "a", replace=replace))
        await until(lambda: contents(tmp_path) == on_disk and not staging(tmp_path))
        assert registry.catalog.all() == [kept]
        engine.refusal, engine.bad_adapters = None, {}
        assert await used_label(registry, engine, "a") == "good"

    tell(story)


def test_a_digest_can_be_required(tell, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        digest = hash_folder(write_adapter(tmp_path / "a", "a"))
        await registry.add(wanted("a", tmp_path / "a", expected=digest))
        write_adapter(tmp_path / "a", "b")
        with pytest.raises(DigestMismatch, match=digest):
            await registry.add(wanted("b", tmp_path / "a", expected=digest))
        await until(lambda: contents(tmp_path) == {digest} and not staging(tmp_path))

    tell(story)


def test_a_cold_request_waits_for_its_own_adapter_and_equal_loads_are_one(tell, engine, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        for name in "ab":
            await registry.add(wanted(name, tmp_path / name, name))
        registry.residents.engine_down()
        assert await used_label(registry, engine, "b") == "b"
        engine.load_gate, engine.load_calls = asyncio.Event(), 0
        cold = [asyncio.create_task(used_label(registry, engine, "a")) for _ in range(20)]
        await until(lambda: engine.load_calls == 1)
        assert await used_label(registry, engine, "b") == "b", "warm: does not wait"
        assert not any(task.done() for task in cold)
        cold[0].cancel()
        engine.load_gate.set()
        assert set(await asyncio.gather(*cold[1:])) == {"a"}
        assert engine.load_calls == 1

    tell(story)


def test_a_failed_load_fails_its_requests_and_is_tried_again_later(
    tell, engine, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("deltamux.server.store.residents.Backoff", lambda: Backoff(lambda: now[0]))

    async def story(registry: AdapterRegistry) -> None:
        await registry.add(wanted("a", tmp_path / "a", "a"))
        registry.residents.engine_down()
        engine.bad_adapters["a"], engine.load_calls = AdapterCorrupt("planted"), 0

        async def ask() -> float:
            with pytest.raises(
                AdapterUnavailable, match=r"'a' cannot be loaded.*planted"
            ) as caught:
                await used_label(registry, engine, "a")
            return caught.value.retry_after

        assert await asyncio.gather(*(ask() for _ in range(5))) == [1.0] * 5
        assert (await ask(), engine.load_calls) == (1.0, 1), "not tried again at once"
        now[0] = 1.5
        assert (await ask(), engine.load_calls) == (2.0, 2)
        now[0] = 3.0
        assert (await ask(), engine.load_calls) == (1.0, 2)
        now[0], engine.bad_adapters = 4.0, {}
        assert await used_label(registry, engine, "a") == "a"
        assert registry.error(registry.catalog.get("a")) is None

    tell(story)


def test_an_engine_that_dies_while_it_loads_fails_the_request_and_not_the_adapter(
    tell, engine, tmp_path
):
    async def story(registry: AdapterRegistry) -> None:
        await registry.add(wanted("a", tmp_path / "a", "a"))
        registry.residents.engine_down()
        engine.refusal = EngineDied("gone")
        with pytest.raises(EngineDied):
            await used_label(registry, engine, "a")
        engine.refusal = None
        assert await used_label(registry, engine, "a") == "a"

    tell(story)


def test_a_promised_adapter_is_fetched_by_whoever_is_first(tell, engine, tmp_path):
    async def first(registry: AdapterRegistry) -> None:
        engine.load_gate = asyncio.Event()
        adapter = await registry.promise(wanted("a", tmp_path / "a", "a"))
        assert adapter.default is None
        with pytest.raises(AdapterUnavailable, match="being fetched"):
            registry.leases.select(ModelChoice("a", OPERATOR))

    async def second(registry: AdapterRegistry) -> None:
        engine.load_gate = None
        await asyncio.gather(*(registry.prepare(ModelChoice("a", OPERATOR)) for _ in range(5)))
        assert await used_label(registry, engine, "a") == "a"
        await registry.promise(wanted("b", tmp_path / "b"))
        with pytest.raises(AdapterUnavailable, match="no adapter folder"):
            await registry.prepare(ModelChoice("b", OPERATOR))
        with pytest.raises(NameRefused):
            await registry.promise(wanted("b/", tmp_path / "b"))

    tell(first)  # which ends before the adapter is there
    tell(second)


PIN_ROOM = Room(host_bytes=5_000, device_bytes=5_000, parts=4)


def test_pins_follow_the_default_version_and_have_a_bound(tell, engine, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        for label in "12":
            await registry.add(wanted("a", tmp_path / "a", label, replace=True))
        ids = {label: adapter_id for adapter_id, label in engine.loaded.items()}
        await registry.set_pinned("a", True, PIN_ROOM)
        await until(lambda: engine.pins == [(ids["2"], True)])
        await registry.set_default("a", None)
        await until(lambda: engine.pins[1:] == [(ids["2"], False), (ids["1"], True)])
        await registry.add(wanted("b", tmp_path / "b", "b"))
        with pytest.raises(PinRefused, match="may take 5000"):
            await registry.set_pinned("b", True, PIN_ROOM)
        engine.pins.clear()
        registry.residents.engine_down()
        registry.residents.engine_ready()
        await until(lambda: engine.pins == [(ids["1"], True)])
        await registry.set_pinned("a", False, PIN_ROOM)
        assert engine.pins[-1] == (ids["1"], False)

    tell(story)


def test_what_a_killed_server_left_is_removed(tell, tmp_path):
    async def story(registry: AdapterRegistry) -> None:
        await registry.add(wanted("a", tmp_path / "a", "a"))

    async def check(registry: AdapterRegistry) -> None:
        assert contents(tmp_path) == {registry.catalog.get("a").default_digest}
        assert staging(tmp_path) == []

    tell(story)
    root = tmp_path / "state" / "adapters"
    write_adapter(root / "staging" / "half", "half")
    write_adapter(root / "contents" / ("f" * 64), "nobody's")
    tell(check)


def test_the_migrations_make_the_tables_of_today(tmp_path):
    with open_database(tmp_path) as database, database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        modes = [connection.execute(text(f"PRAGMA {each}")).scalar_one() for each in PRAGMAS]
        assert modes == list(PRAGMAS.values())


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_state_folder_has_one_server_and_a_broken_database_is_named(tmp_path):
    with (
        open_database(tmp_path),
        pytest.raises(StateError, match="--state-dir"),
        open_database(tmp_path),
    ):
        pass
    (tmp_path / DATABASE_FILE).write_bytes(b"no database at all, but long enough" * 100)
    with pytest.raises(StateError, match=DATABASE_FILE), open_database(tmp_path):
        pass


NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000) "
COPIES = (
    NUMBERS + "INSERT INTO adapters (base, name, origin, source, pinned, default_digest, created,"
    " hits) SELECT base, 'copy-' || i, origin, source, pinned, printf('%064x', i), created, hits"
    " FROM n, adapters WHERE name = 'a'",
    "INSERT INTO versions (adapter_id, digest, source, fingerprint, file_bytes, info, registered)"
    " SELECT adapters.id, adapters.default_digest, v.source, fingerprint, file_bytes, info,"
    " registered FROM adapters, versions v WHERE adapters.name LIKE 'copy-%'",
)


def test_ten_thousand_adapters_are_there_in_seconds_and_no_file_is_read(tell, engine, tmp_path):
    """Rows as registrations write them; their files are not even there."""

    async def one(registry: AdapterRegistry) -> None:
        engine.targets = [f"model.layers.{n}.self_attn.q_proj" for n in range(60)]
        await registry.add(wanted("a", tmp_path / "a", "a"))

    async def all_of_them(registry: AdapterRegistry) -> None:
        assert len(registry.catalog) == 10_001
        assert registry.catalog.resolve("copy-9999", OPERATOR).version.digest == f"{9999:064x}"
        assert engine.load_calls == 1, "the engine knows the one alone"

    tell(one)
    with open_database(tmp_path / "state") as database, database.begin() as connection:
        for statement in COPIES:
            connection.execute(text(statement))
    started = time.monotonic()
    tell(all_of_them)
    assert time.monotonic() - started < 15
