"""Systems that are servers: asked over HTTP by the load generator."""

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from ...client import Answer, Request, RequestFailed, open_client
from ...load.run import Outcome, run
from ..process import Process, SystemFailed, Word
from ..scenarios import Scenario, Size

_START_SECONDS, _POLL_SECONDS = 600.0, 0.5
SILENCE_SECONDS = 300.0


@dataclass(slots=True)
class Server:
    """A running server.

    Attributes:
        process: Of it.
        url: Where it listens.
        versions: Of what it is made of.
        settings: How it was started.
        extras: Fields that requests for a model need beside its name.
        reuse: Whether it keeps connections open for further requests.
    """

    process: Process
    url: str
    versions: Mapping[str, object]
    settings: Mapping[str, object]
    extras: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    reuse: bool = True

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids, all requests in flight at once; raises SystemFailed."""
        try:
            return asyncio.run(_ask_all(self.url, requests))
        except ExceptionGroup as errors:
            failed, others = errors.split((httpx.HTTPError, RequestFailed))
            if failed is None or others is not None:
                raise
            raise SystemFailed(f"a request failed: {failed.exceptions[0]}") from errors

    def run(self, scenario: Scenario, size: Size, phase: str) -> Outcome:
        """Warm up, then measure; raises SystemFailed if the server ended."""
        workload = scenario.workload(size, phase, self.extras)
        outcome = asyncio.run(run(self.url, workload, SILENCE_SECONDS, reuse=self.reuse))
        if self.process.ended():
            raise SystemFailed(self.process.obituary())
        return outcome

    def freeze(self) -> None:
        """Take no time of any core until thawed."""
        self.process.freeze()

    def thaw(self) -> None:
        """Go on."""
        self.process.thaw()

    def end(self) -> None:
        """End it."""
        self.process.end()


def start_server(
    command: Sequence[Word], log: Path, env: Mapping[str, str], ready: str
) -> tuple[Process, str]:
    """Start a server on a free port of loopback: it and its address, once ``ready`` answers 200.

    Raises:
        SystemFailed: It ended before, or took too long.
    """
    port = _free_port()
    process = Process([*command, "--host", "127.0.0.1", "--port", str(port)], log, env)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url, ready)
    except BaseException:
        process.end()
        raise
    return process, url


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(process: Process, url: str, path: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with httpx.Client(base_url=url, trust_env=False) as client:
        while not _answers(client, path):
            if process.ended() or time.monotonic() > deadline:
                raise SystemFailed(f"it did not start: {process.obituary()}")
            time.sleep(_POLL_SECONDS)


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


async def _ask_all(url: str, requests: Sequence[Request]) -> list[list[int]]:
    async with open_client(url, SILENCE_SECONDS) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(_ask(client, each)) for each in requests]
    return [task.result() for task in tasks]


async def _ask(client: httpx.AsyncClient, request: Request) -> list[int]:
    answer = Answer(request)
    async for _ in answer.arrivals(client):
        pass
    return answer.token_ids
