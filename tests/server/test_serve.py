"""Which adapters a server starts with."""

import asyncio
from dataclasses import replace

import pytest
from click.testing import CliRunner

from deltamux.adapters.errors import AdapterCorrupt
from deltamux.server import serve
from deltamux.server.api.registry import AdapterRegistry, AdapterState
from deltamux.server.cli import cli

from .fake_engine import FakeEngine, byte_level_tokenizer


@pytest.fixture
def config(monkeypatch):
    """The configuration of ``deltamux serve`` without options."""
    made = []
    monkeypatch.setattr("deltamux.server.serve.run", made.append)
    CliRunner().invoke(cli, ["serve", "--served-model-name", "base"], catch_exceptions=False)
    return made.pop()


def register(config) -> AdapterRegistry:
    async def run() -> AdapterRegistry:
        engine = FakeEngine(byte_level_tokenizer())
        engine.bad_adapters = {
            str(path): AdapterCorrupt("planted")
            for folder in config.adapter_dirs
            for path in folder.glob("broken")
        }
        registry = AdapterRegistry("base", engine)
        await serve._register_adapters(config, registry)
        return registry

    return asyncio.run(run())


def make_folder(path, file="adapter_config.json"):
    path.mkdir(parents=True)
    (path / file).touch()
    return path


def test_a_folder_is_served_under_its_own_name_and_refused_ones_are_listed(config, tmp_path):
    shelf, store = tmp_path / "shelf", tmp_path / "store"
    good = make_folder(store / "abc123")
    make_folder(shelf / "plain")
    (shelf / "linked").symlink_to(good)
    make_folder(shelf / "broken")
    make_folder(shelf / "with space")
    make_folder(shelf / "base")
    make_folder(shelf / "weights only", "adapter_model.safetensors")
    make_folder(shelf / ".cache", "something else")
    (shelf / "a file").touch()

    registry = register(replace(config, adapter_dirs=(shelf,)))

    states = {entry.name: entry.state for entry in registry.entries()}
    ready, failed = AdapterState.READY, AdapterState.FAILED
    assert states == {
        "plain": ready,
        "linked": ready,
        "broken": failed,
        "with space": failed,
        "base": failed,
        "weights only": failed,
    }
    assert registry.get("linked").path == str(good)
    assert "planted" in registry.get("broken").error
    assert registry.resolve("base") is None


def test_a_named_adapter_wins_over_a_folder_of_that_name(config, tmp_path):
    named = make_folder(tmp_path / "elsewhere")
    make_folder(tmp_path / "shelf" / "a")
    registry = register(
        replace(config, adapters=(("a", named),), adapter_dirs=(tmp_path / "shelf",))
    )
    assert registry.get("a").path == str(named)


def test_a_refused_named_adapter_stops_the_start(config, tmp_path):
    broken = make_folder(tmp_path / "shelf" / "broken")
    changed = replace(config, adapters=(("mine", broken),), adapter_dirs=(tmp_path / "shelf",))
    with pytest.raises(serve.ServeError, match=r"mine.*planted"):
        register(changed)
