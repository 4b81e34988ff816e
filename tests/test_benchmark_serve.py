"""The load generator against a scripted server: what it sends, counts and reports."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

MODULE = "deltamux.benchmarks.serve"
MODELS = [{"id": "base", "parent": None}] + [{"id": f"a{i}", "parent": "base"} for i in range(3)]


class ScriptedServer(ThreadingHTTPServer):
    """Streams ``chunk_sizes`` tokens per chunk to every request and remembers the requests."""

    daemon_threads = True
    chunk_sizes: tuple[int, ...] = (1, 3, 2)
    with_token_ids = True
    refused_models: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def chunk(self, size: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "x" * size}
        if self.with_token_ids:
            choice["token_ids"] = list(range(size))
        return {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        replies = {"/v1/models": {"data": MODELS}, "/version": {"version": "0"}}
        self.reply(200, "application/json", json.dumps(replies[self.path]).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if body["model"] in self.server.refused_models:
            self.reply(404, "application/json", b'{"error": {"message": "no such model"}}')
            return
        events = [self.server.chunk(size) for size in self.server.chunk_sizes] + [{"choices": []}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self.reply(200, "text/event-stream", "".join(lines).encode())

    def reply(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def bench(server: ScriptedServer, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, JSON of the last line, stderr) of a small run."""
    command = [sys.executable, "-m", MODULE, "--base-url", server.url, "--concurrency", "2"]
    command += ["--requests", "6", "--prompt-tokens", "5", "--output-tokens", "6", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_counts_the_tokens_of_every_chunk(server: ScriptedServer) -> None:
    code, report, _ = bench(server)
    assert code == 0
    assert report["result"]["completed"] == 6
    assert report["result"]["output_tokens"] == 36
    latencies = report["result"]["itl_ms"]
    assert 0 <= latencies["p50"] <= latencies["p90"] <= latencies["p99"]
    assert {"machine", "versions", "workload"} <= report.keys()


def test_sends_exact_and_distinct_prompts_in_turn_over_adapters(server: ScriptedServer) -> None:
    _, report, _ = bench(server, "--adapters", "3", "--warmup", "2", "--seed", "7")
    assert report["workload"]["models"] == ["a0", "a1", "a2"]
    assert report["workload"]["seed"] == 7
    assert len(server.bodies) == 2 + 6
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert {len(prompt) for prompt in prompts} == {5}
    assert len(set(prompts)) == len(prompts)
    measured = [body["model"] for body in server.bodies[2:]]
    assert sorted(measured) == ["a0", "a0", "a1", "a1", "a2", "a2"]
    assert all(body["ignore_eos"] and body["max_tokens"] == 6 for body in server.bodies)


def test_the_same_seed_sends_the_same_prompts(server: ScriptedServer) -> None:
    bench(server)
    first = {tuple(body["prompt"]) for body in server.bodies}
    server.bodies.clear()
    bench(server)
    assert {tuple(body["prompt"]) for body in server.bodies} == first


def test_a_short_answer_is_a_failed_request(server: ScriptedServer) -> None:
    server.chunk_sizes = (1, 3)
    code, report, stderr = bench(server)
    assert code == 1
    assert report["result"]["failed"] == 6
    assert report["result"]["ttft_ms"]["p50"] is None
    assert "asked for 6 tokens, got 4" in stderr


def test_a_server_without_token_ids_must_send_one_token_a_chunk(server: ScriptedServer) -> None:
    server.with_token_ids = False
    server.chunk_sizes = (1,) * 6
    code, report, _ = bench(server)
    assert (code, report["result"]["output_tokens"]) == (0, 36)


def test_refused_requests_fail_and_leave_the_others_measured(server: ScriptedServer) -> None:
    server.refused_models = frozenset({"gone"})
    code, report, stderr = bench(server, "--models", "base,gone", "--warmup", "0")
    assert code == 1
    assert (report["result"]["completed"], report["result"]["failed"]) == (3, 3)
    assert "no such model" in stderr


def test_too_few_adapters_is_refused_before_any_request(server: ScriptedServer) -> None:
    command = [sys.executable, "-m", MODULE, "--base-url", server.url, "--adapters", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "the server lists 3 adapters" in result.stderr
    assert server.bodies == []
