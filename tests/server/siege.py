"""Steady good traffic beside an attack, and the books that must balance when both are over."""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from .running import RunningServer

IDLE_GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
# asyncio's pool for long prompts starts its workers when they are first needed.
POOL_THREADS = 8


@dataclass(frozen=True)
class GoodCase:
    """A request whose greedy answer is known."""

    model: str
    prompt: list[int]
    expected: list[int]

    def body(self, stream: bool) -> dict[str, object]:
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": len(self.expected),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
        }

    def ask(self, client: httpx.Client) -> list[int]:
        answer = client.post("/v1/completions", json=self.body(stream=False))
        return answer.raise_for_status().json()["choices"][0]["token_ids"]

    def stream(self, client: httpx.Client) -> list[int]:
        token_ids: list[int] = []
        with client.stream("POST", "/v1/completions", json=self.body(stream=True)) as answer:
            for event in events(answer):
                token_ids += event["choices"][0]["token_ids"]
        return token_ids


def events(answer: httpx.Response) -> Iterator[dict]:
    """The JSON events of a stream, which must end with ``[DONE]``."""
    last = None
    for line in answer.iter_lines():
        if line:
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                yield json.loads(last)
    assert last == "[DONE]", last


@dataclass
class Background:
    """Threads that ask good cases over and over, and note each answer that is not as expected."""

    url: str
    cases: list[GoodCase]
    served: int = 0
    wrong: list[object] = field(default_factory=list)

    @contextmanager
    def running(self, threads: int = 2) -> Iterator[None]:
        over = threading.Event()
        workers = [
            threading.Thread(target=self._work, args=(over, first)) for first in range(threads)
        ]
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            over.set()
            for worker in workers:
                worker.join()

    def _work(self, over: threading.Event, first: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            # At least one round each, whatever the attack's length.
            for turn in itertools.count(first):
                case = self.cases[turn % len(self.cases)]
                self._ask(case, client, turn)
                if over.is_set() and turn >= first + len(self.cases):
                    return

    def _ask(self, case: GoodCase, client: httpx.Client, turn: int) -> None:
        try:
            found: object = case.stream(client) if turn % 2 else case.ask(client)
        except (httpx.HTTPError, AssertionError) as error:
            found = error
        if found == case.expected:
            self.served += 1
        else:
            self.wrong.append((case.model, found))


@dataclass(frozen=True)
class Books:
    """What a process holds."""

    engine: int
    descriptors: tuple[int, int]
    threads: tuple[int, int]

    @classmethod
    def of(cls, server: RunningServer) -> "Books":
        pids = (server.process.pid, server.engine_pid())
        return cls(
            pids[1],
            tuple(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
            tuple(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids),
        )

    def balance(self, now: "Books") -> bool:
        return (
            now.engine == self.engine
            and all(n <= o + 2 for n, o in zip(now.descriptors, self.descriptors, strict=True))
            and now.threads[0] <= self.threads[0] + POOL_THREADS
            and now.threads[1] <= self.threads[1]
        )


@contextmanager
def undisturbed(server: RunningServer, cases: list[GoodCase], log: Path) -> Iterator[None]:
    """The block attacks; good requests beside it are answered as ever, and nothing stays behind."""
    before, logged = Books.of(server), len(log.read_text())
    background = Background(server.url, cases)
    with background.running():
        yield
    assert background.wrong == []
    assert background.served >= 2 * len(cases)
    eventually(lambda: set(gauges(server).values()) == {0.0}, lambda: gauges(server))
    eventually(lambda: before.balance(Books.of(server)), lambda: (before, Books.of(server)))
    assert "ERROR" not in log.read_text()[logged:], log.read_text()[logged:]


def gauges(server: RunningServer) -> dict[str, float]:
    """The gauges that are 0 on an idle server."""
    text = httpx.get(f"{server.url}/metrics").text
    found = {
        name: re.findall(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        for name in IDLE_GAUGES
    }
    return {name: float(value) for name, [value] in found.items()}


def eventually(
    holds: Callable[[], bool], show: Callable[[], object] = lambda: "", seconds: float = 15
) -> None:
    """Wait until ``holds`` is true; fail with what ``show`` says after that many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, show()
        time.sleep(0.02)
