"""A server whose engine is killed, a server that is told to stop, and one that cannot start."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from peft import LoraConfig

from .peft_oracle import Oracle
from .running import RunningServer, running_server
from .siege import eventually, gauges

PROMPT = list(range(40, 60))
BODY = {"prompt": PROMPT, "temperature": 0, "extra_body": {"ignore_eos": True}}
CONFIGS = {
    "one": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "two": LoraConfig(r=16, lora_alpha=16, target_modules=["up_proj", "down_proj"]),
}
LONG = 4000  # tokens: far more than are generated while a test looks at the stream


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> dict[str, Path]:
    oracle, folder = Oracle(model), tmp_path_factory.mktemp("adapters")
    return {
        name: oracle.save_adapter(config, folder / name, seed, size=0.1)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture
def sockets() -> Iterator[Path]:
    """Where the server keeps its temporary files: a short path, as those of sockets must be."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def server(model, adapters, sockets, tmp_path) -> Iterator[RunningServer]:
    options = [f"--adapter={name}={path}" for name, path in adapters.items()]
    options += ["--served-model-name", "base", "--memory-budget", "16MiB", "--dtype", "float32"]
    options += ["--kernels", "auto", "--log-format", "json"]
    env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(sockets)}
    with running_server(model, *options, log=tmp_path / "log", **env) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0) as client:
        yield client


def answers(client: openai.OpenAI) -> dict[str, str]:
    return {
        name: client.completions.create(model=name, max_tokens=20, **BODY).choices[0].text
        for name in ("base", *CONFIGS)
    }


def status(server: RunningServer, path: str) -> int:
    return httpx.get(f"{server.url}{path}").status_code


def models(server: RunningServer) -> list[dict]:
    return httpx.get(f"{server.openai_url}/models").json()["data"]


def test_a_crash_of_the_engine_and_a_signal_to_stop(server, client, sockets, tmp_path):
    kill_engine(server, client)
    stop_with_open_streams(server, client, sockets)
    check_log(tmp_path / "log")


def kill_engine(server: RunningServer, client: openai.OpenAI) -> None:
    """Streams end with an error, the server stays up, and all is as before once it is ready."""
    before, listed, killed = answers(client), models(server), server.engine_pid()
    assert len(set(before.values())) == 3
    stream = client.completions.create(model="one", max_tokens=LONG, stream=True, **BODY)
    next(stream)
    body = {"model": "two", "prompt": PROMPT, "max_tokens": LONG, "stream": True}
    with httpx.stream("POST", f"{server.openai_url}/completions", json=body) as raw:
        lines = (line.removeprefix("data: ") for line in raw.iter_lines() if line)
        assert "choices" in json.loads(next(lines))
        os.kill(killed, signal.SIGKILL)
        *_, last = lines
    assert sorted(json.loads(last)["error"]) == ["code", "message", "param", "type"]
    with pytest.raises(openai.APIError, match="engine") as ended:
        list(stream)
    assert ended.value.body["code"] == 503

    # Half a second passes before another engine is started, and seconds before it is ready.
    refused = httpx.post(f"{server.openai_url}/completions", json={"model": "two", "prompt": "x"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    assert (status(server, "/health"), status(server, "/ready")) == (200, 503)
    assert "vllm:num_requests_running" not in httpx.get(f"{server.url}/metrics").text
    assert [card["id"] for card in models(server)] == ["base", *CONFIGS]

    eventually(lambda: status(server, "/ready") == 200, seconds=60)
    assert server.engine_pid() != killed
    assert answers(client) == before
    assert models(server) == listed
    eventually(lambda: set(gauges(server).values()) == {0.0}, lambda: gauges(server))
    text = httpx.get(f"{server.url}/metrics").text
    assert (
        'vllm:request_success_total{engine="0",finished_reason="error",model_name="base"} 2.0'
        in text
    )


def stop_with_open_streams(server: RunningServer, client: openai.OpenAI, sockets: Path) -> None:
    """The server ends within seconds, with status 0, and leaves no process and no file behind."""
    pids = [server.process.pid, *server.children()]
    streams = [
        client.completions.create(model=name, max_tokens=LONG, stream=True, **BODY)
        for name in ("base", "one", "two")
    ]
    for stream in streams:
        next(stream)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=15) == 0
    eventually(lambda: not any(map(is_alive, pids)), lambda: list(filter(is_alive, pids)))
    assert list(sockets.glob("deltamux-*")) == []


def check_log(log: Path) -> None:
    """Both processes write JSON; what the engine knows of a request is in its line."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    access = [line for line in lines if line["logger"] == "deltamux.access"]
    [*_, answered] = [line for line in access if line.get("finish_reasons") == "length"]
    assert 0 < answered["queue_seconds"] < answered["first_token_seconds"] < answered["seconds"]
    assert (answered["model"], answered["completion_tokens"]) == ("two", 20)


def is_alive(pid: int) -> bool:
    """Whether it runs: one that has ended is a zombie until its new parent asks for its status."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def serve(*arguments: str, tmp_path: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "deltamux", "serve", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "deltamux.yaml"
    path.write_text("dtype: float32\nno_such_option: 1\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["{model}", "--adapter", "bad=/nonexistent"],
            ["bad", "/nonexistent", "no adapter folder"],
        ),
        (["/nonexistent"], ["/nonexistent"]),
        (["{model}", "--config", "{config}"], ["no_such_option"]),
        (["{model}", "--config", "/nonexistent.yaml"], ["/nonexistent.yaml"]),
        (["{model}", "--port", "{port}"], ["{port}"]),
        (["{model}", "--dtype", "float16"], ["float16"]),
        (["{model}", "--host", "0.0.0.0"], ["0.0.0.0", "--tenants", "--allow-open"]),
        (["{model}", "--tenants", "{config}"], ["{config}", "dtype", "unknown key"]),
        (["{model}", "--memory-budget", "1"], ["--memory-budget"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if "{" in value[0] else None,
)
def test_a_server_that_cannot_start(arguments, says, model, config_file, busy_port, tmp_path):
    values = {"model": model, "config": config_file, "port": busy_port}
    given = [argument.format(**values) for argument in arguments]
    port = [] if "--port" in given else ["--port", "0"]
    ended = serve(*given, *port, tmp_path=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr
    assert [line for line in lines[:-1] if not line.startswith(("INFO", "WARNING"))] == []
    for word in says:
        assert word.format(**values) in lines[-1], lines[-1]
    assert list(tmp_path.glob("deltamux-*")) == []
