"""Versions on a real engine: no stale KV, pins, freed memory, and ``kill -9`` of the server."""

import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from peft import LoraConfig

from .peft_oracle import Oracle
from .running import RunningServer, running_server
from .siege import eventually

PROMPT = list(range(40, 88))
COUNT = 8
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def versions(model, tmp_path_factory) -> dict[str, tuple[Path, list[int]]]:
    """Folders of one adapter trained twice, and what each answers."""
    oracle, folder = Oracle(model), tmp_path_factory.mktemp("versions")
    saved = {
        name: oracle.save_adapter(LORA, folder / name, seed, size=0.3)
        for seed, name in enumerate(("old", "new"))
    }
    return {
        name: (path, oracle.generate(PROMPT, COUNT, path).token_ids) for name, path in saved.items()
    }


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def start(model: Path, tmp_path: Path, sockets: Path):
    options = ["--served-model-name", "base", "--memory-budget", "16MiB", "--dtype", "float32"]
    env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(sockets)}
    return running_server(model, *options, log=tmp_path / "log", **env)


def ask(server: RunningServer, name: str) -> tuple[list[int], int]:
    """Tokens of the answer, and how many of the prompt came from the cache."""
    body = {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": COUNT,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{server.openai_url}/completions", json=body, timeout=60)
    content = answer.raise_for_status().json()
    cached = content["usage"]["prompt_tokens_details"]["cached_tokens"]
    return content["choices"][0]["token_ids"], cached


def loaded(server: RunningServer) -> set[tuple[str, str, str]]:
    found = re.findall(
        r'lora_adapter_loaded\{adapter_name="(.*?)",level="(.*?)",pinned="(.*?)"\}',
        httpx.get(f"{server.url}/metrics").text,
    )
    return set(found)


def test_a_reloaded_adapter_and_a_killed_server(model, versions, tmp_path, sockets):
    (old, old_tokens), (new, new_tokens) = versions["old"], versions["new"]
    assert old_tokens != new_tokens
    with start(model, tmp_path, sockets) as server:
        url = f"{server.openai_url}/adapters"
        first = httpx.post(url, json={"name": "a", "source": str(old)}).raise_for_status().json()
        assert ask(server, "a") == (old_tokens, 0)
        assert ask(server, "a") == (old_tokens, 32), "its own cached blocks"

        body = {"name": "a", "source": str(new), "replace": True}
        second = httpx.post(url, json=body).raise_for_status().json()
        assert ask(server, "a") == (new_tokens, 0), "nothing of the old version's cache"
        assert ask(server, f"a@{first['digest'][:12]}") == (old_tokens, 32)
        httpx.patch(f"{url}/a", json={"rollback": True, "pinned": True}).raise_for_status()
        assert ask(server, "a")[0] == old_tokens
        other = f"a@{second['digest'][:12]}"
        assert loaded(server) == {
            (name, level, str(name == "a").lower())
            for name in ("a", other)
            for level in ("gpu", "cpu")
        }
        httpx.post(url, json={"name": "b", "source": str(new)}).raise_for_status()
        httpx.delete(f"{url}/b").raise_for_status()
        assert loaded(server) >= {(other, "cpu", "false")}, "shared with another name"

        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with start(model, tmp_path, sockets) as server:
        url = f"{server.openai_url}/adapters"
        card = httpx.get(f"{url}/a").json()
        assert (card["digest"], card["pinned"]) == (first["digest"], True)
        there = {("a", "cpu", "true"), ("a", "gpu", "true")}
        eventually(lambda: loaded(server) == there, lambda: loaded(server))
        assert ask(server, "a") == (old_tokens, 0)
        assert ask(server, other) == (new_tokens, 0)
        assert httpx.get(f"{url}/a").json()["state"] == "on_device"
        httpx.delete(f"{url}/a").raise_for_status()
        assert loaded(server) == set()
        assert list((tmp_path / "state" / "adapters" / "contents").iterdir()) == []
