"""A server that speaks OpenAI's completions API by a script: a real uvicorn on loopback."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import uvicorn

ADAPTERS = ["a0", "a1", "a2", "a3"]


@dataclass
class FakeServer:
    """What it does, and what it was asked.

    The model's name decides how a request fails: ``refused``, ``busy``, ``torn`` (the connection
    breaks off after a chunk), ``failing`` (an error event after a chunk), ``undone`` (no [DONE]),
    ``garbled`` (no JSON), ``short`` and ``long`` (a token less or more than asked for), ``leaky``
    (repeats the key).
    """

    url: str = ""
    chunk_sizes: tuple[int, ...] = (1,)
    with_token_ids: bool = True
    with_usage: bool = True
    with_version: bool = True
    line_end: str = "\n"
    seconds_per_chunk: float = 0.0
    together: int = 0  # no request is answered before this many have run at once
    base: str | None = "base"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    connections: set[tuple[str, int]] = field(default_factory=set)
    running: int = 0
    most_running: int = 0

    def reset(self) -> None:
        """To what it does by itself, asked nothing yet."""
        vars(self).update(vars(FakeServer(self.url)))

    async def __call__(self, scope, receive, send) -> None:
        self.connections.add(tuple(scope["client"]))
        answer = {"/v1/models": self._models(), "/version": {"version": "0"}}.get(scope["path"])
        if scope["method"] == "GET":
            there = answer is not None and (self.with_version or scope["path"] != "/version")
            await _send_json(send, 200 if there else 404, answer if there else {})
            return
        body = json.loads(await _read(receive))
        headers = dict(scope["headers"])
        self.bodies.append(body)
        self.keys.append(headers.get(b"authorization", b"").decode() or None)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            while self.most_running < self.together:
                await asyncio.sleep(0.001)
            await self._complete(body, send)
        finally:
            self.running -= 1

    def _models(self) -> dict[str, Any]:
        base = [] if self.base is None else [{"id": self.base, "parent": None}]
        return {"data": base + [{"id": name, "parent": self.base or ""} for name in ADAPTERS]}

    async def _complete(self, body: dict[str, Any], send) -> None:
        match body["model"]:
            case "refused":
                await _send_json(send, 404, {"error": {"message": "no such\nmodel"}})
                return
            case "busy":
                await _send_json(send, 429, {"error": {"message": "too many requests"}})
                return
            case "leaky":
                await _send_json(send, 401, {"error": f"wrong key {self.keys[-1]}"})
                return
        start = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": [(b"content-type", b"text/event-stream")]})
        for index, size in enumerate(self._sizes(body)):
            if index == 1 and body["model"] == "torn":
                return
            await asyncio.sleep(self.seconds_per_chunk)
            await self._event(send, self._chunk(size))
            if body["model"] == "failing":
                await self._event(send, {"error": {"message": "the engine died"}})
                return
            if body["model"] == "garbled":
                await self._event(send, ["no object"])
        if self.with_usage:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            await self._event(send, {"choices": [], "usage": usage})
        if body["model"] != "undone":
            await self._write(send, "data: [DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _sizes(self, body: dict[str, Any]) -> Iterator[int]:
        left = body["max_tokens"] + {"short": -1, "long": 1}.get(body["model"], 0)
        for size in cycle(self.chunk_sizes):
            if left <= 0:
                return
            yield min(size, left)
            left -= size

    def _chunk(self, size: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "x" * size, "finish_reason": None}
        return {
            "choices": [choice | ({"token_ids": list(range(size))} if self.with_token_ids else {})],
            "usage": None,
        }

    async def _event(self, send, event: object) -> None:
        await self._write(send, f"data: {json.dumps(event)}")

    async def _write(self, send, line: str) -> None:
        content = f"{line}{self.line_end}{self.line_end}".encode()
        await send({"type": "http.response.body", "body": content, "more_body": True})


async def _read(receive) -> bytes:
    content = b""
    while True:
        message = await receive()
        content += message["body"]
        if not message["more_body"]:
            return content


async def _send_json(send, status: int, value: object) -> None:
    start = {"type": "http.response.start", "status": status}
    await send(start | {"headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """The server in a thread; its socket listens from the start."""
    fake = FakeServer()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(fake, log_config=None, lifespan="off", ws="none", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join()
