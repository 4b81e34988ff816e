"""Kills a server at random moments under load, and compares its ledger with what clients received.

Each client has a tenant of its own and keeps a book of what it was told. What was journalled and
killed before it was sent counts, so after a kill a tenant may have been charged for more than it
received: for the last update of the one request it had open, and for nothing else. That is one
token of a stream, with the prompt if it was the first one, and all of an answer that is not
streamed. A tenant with no request open has exactly what it received.

    python -m tests.server.usage_rounds scripted 100    # the HTTP process, with a scripted engine
    python -m tests.server.usage_rounds real 100        # either process of `deltamux serve`
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from deltamux.server.tenants.directory import Account, Key
from deltamux.server.tenants.keys import hash_key
from deltamux.server.tenants.tenant import Role, Tenant

from ..tiny_models import make_tiny
from .fake_engine import byte_level_tokenizer, serving
from .running import engine_of, engines_of, running_server
from .siege import eventually

CLIENTS = 6
ADMIN = "key-of-the-administrator"
TOKENS = 40
COUNTED = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")


@dataclass(frozen=True)
class Amounts:
    """Requests and tokens."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(*(a + b for a, b in zip(self.all(), other.all(), strict=True)))

    def __sub__(self, other: "Amounts") -> "Amounts":
        return Amounts(*(a - b for a, b in zip(self.all(), other.all(), strict=True)))

    def all(self) -> tuple[int, int, int, int]:
        return (self.requests, self.prompt, self.completion, self.cached)


NOTHING = Amounts()


@dataclass
class Client:
    """Asks over and over until its server is gone, and keeps the book of one tenant."""

    name: str
    received: Amounts = NOTHING
    now: Amounts = NOTHING
    """What the open request was told to have taken so far."""
    open: dict | None = None
    updates: threading.Semaphore = field(default_factory=threading.Semaphore)
    """Released whenever a client is told something; all share one."""

    @property
    def key(self) -> str:
        return f"key-of-{self.name}"

    def work(self, url: str, over: threading.Event, seed: float) -> None:
        """Ask until ``over``; a request that breaks off stays open in the book."""
        rng = random.Random(seed)
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            while not over.is_set() and self.open is None:
                self.ask(client, rng)

    def ask(self, client: httpx.Client, rng: random.Random) -> None:
        body = {
            "model": "base",
            "prompt": [rng.randrange(40, 60) for _ in range(rng.randrange(3, 20))],
            "max_tokens": rng.randrange(1, TOKENS),
            "ignore_eos": True,
            "temperature": 0,
            "stream": rng.random() < 0.8,
        }
        self.open, self.now = body, NOTHING
        try:
            self.stream(client, body) if body["stream"] else self.whole(client, body)
        except httpx.TransportError:
            return
        # Well or not, the client knows how it ended.
        self.received += self.now
        self.open, self.now = None, NOTHING

    def stream(self, client: httpx.Client, body: dict) -> None:
        body = {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                event = line.removeprefix("data: ")
                if event not in ("", "[DONE]") and "usage" in (chunk := json.loads(event)):
                    self.now = told(chunk["usage"])
                    self.updates.release()

    def whole(self, client: httpx.Client, body: dict) -> None:
        answer = client.post("/v1/completions", json=body)
        if answer.status_code == 200:
            self.now = told(answer.json()["usage"])
            self.updates.release()

    def check(self, ledger: Amounts) -> Amounts:
        """Compare the ledger with the book, which then becomes certain of it; the surplus."""
        surplus = ledger - self.received - self.now
        assert surplus == NOTHING or self.open is not None, (self, ledger)
        if surplus != NOTHING:
            self.check_last_update(self.open, surplus)
        self.received, self.open, self.now = ledger, None, NOTHING
        return surplus

    def check_last_update(self, body: dict, surplus: Amounts) -> None:
        first = self.now == NOTHING
        prompt = len(body["prompt"]) if first else 0
        tokens = 1 if body["stream"] else body["max_tokens"]
        assert (surplus.requests, surplus.prompt) == (int(first), prompt), (self, surplus)
        assert surplus.completion == tokens, (self, surplus)
        assert 0 <= surplus.cached <= prompt, (self, surplus)


def told(usage: dict) -> Amounts:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Amounts(1, usage["prompt_tokens"], usage["completion_tokens"], cached)


@dataclass
class Target:
    """A server: its address, and the processes that can be killed."""

    url: str
    http: int
    engine: int | None = None

    def ledger(self) -> dict[str, Amounts]:
        """What every tenant is charged for."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        query = {"group_by": "tenant"}
        answer = httpx.get(f"{self.url}/v1/usage", params=query, headers=headers, timeout=30)
        rows = answer.raise_for_status().json()["data"]
        return {row["tenant"]: Amounts(*(row[name] for name in COUNTED)) for row in rows}


@dataclass
class Rounds:
    """Many kills of one server's processes, and what came of them."""

    rng: random.Random
    clients: list[Client]
    kills: int = 0
    surplus: Amounts = NOTHING

    def under_load(self, target: Target, victim: int) -> None:
        """Kill one process while all clients ask, a random moment after a random update."""
        over = threading.Event()
        workers = [
            threading.Thread(target=client.work, args=(target.url, over, self.rng.random()))
            for client in self.clients
        ]
        for worker in workers:
            worker.start()
        for _ in range(self.rng.randrange(1, 400)):
            assert self.clients[0].updates.acquire(timeout=60), "the server tells nothing"
        time.sleep(self.rng.uniform(0, 0.02))  # the moment of the kill is the point of the test
        os.kill(victim, signal.SIGKILL)
        over.set()
        for worker in workers:
            worker.join()
        self.kills += 1

    def check(self, target: Target) -> None:
        ledger = target.ledger()
        for client in self.clients:
            self.surplus += client.check(ledger.get(client.name, NOTHING))

    def received(self) -> Amounts:
        return sum((client.received for client in self.clients), NOTHING)


def make_rounds(seed: int) -> Rounds:
    updates = threading.Semaphore(0)
    clients = [Client(f"tenant-{number}", updates=updates) for number in range(CLIENTS)]
    return Rounds(random.Random(seed), clients)


def accounts(clients: list[Client]) -> list[Account]:
    users = [Account(Tenant(each.name), Role.USER, (key(each.key),)) for each in clients]
    return [*users, Account(Tenant("root"), Role.ADMIN, (key(ADMIN),))]


def key(text: str) -> Key:
    return Key(hash_key(text))


def serve_again_and_again(state_dir: Path) -> None:
    """The child: a new server, in a process of its own, for every line of its input.

    It is forked, so that what takes seconds to import is imported once.
    """
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            serve_for_ever(state_dir)
        os.waitpid(pid, 0)


def serve_for_ever(state_dir: Path) -> None:
    """A scripted engine behind the real HTTP application."""
    users = accounts(make_rounds(0).clients)
    with serving(byte_level_tokenizer(), accounts=users, state_dir=state_dir) as running:
        running.engine.reply = lambda _: "the quick brown fox jumps over the lazy dog " * 9
        sys.stdout.write(f"{running.url} {os.getpid()}\n")
        sys.stdout.flush()
        threading.Event().wait()


@contextmanager
def scripted(state_dir: Path) -> Iterator[Callable[[], Target]]:
    """Starts servers with a scripted engine, one after the other's death."""
    command = [sys.executable, "-m", "tests.server.usage_rounds", "--child", str(state_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:

        def start() -> Target:
            child.stdin.write("\n")
            child.stdin.flush()
            url, pid = child.stdout.readline().split()
            return Target(url, int(pid))

        yield start


def run_scripted(kills: int, seed: int) -> Rounds:
    """Kill the HTTP process so many times."""
    rounds = make_rounds(seed)
    with tempfile.TemporaryDirectory() as folder, scripted(Path(folder)) as start:
        while rounds.kills < kills:
            target = start()
            rounds.check(target)
            rounds.under_load(target, target.http)
        target = start()
        rounds.check(target)
        os.kill(target.http, signal.SIGKILL)
    return rounds


@contextmanager
def real(model: Path | str, folder: Path) -> Iterator[Target]:
    """``deltamux serve`` with the tenants of the clients."""
    file = folder / "tenants.yaml"
    clients = make_rounds(0).clients
    tenants = [{"name": each.name, "keys": [hash_key(each.key)]} for each in clients]
    file.write_text(yaml.safe_dump({"admin_keys": [hash_key(ADMIN)], "tenants": tenants}))
    options = ["--served-model-name", "base", "--tenants", str(file), "--memory-budget", "64MiB"]
    env = {"OMP_NUM_THREADS": "1"}
    with running_server(model, *options, log=folder / "log", **env) as server:
        yield Target(server.url, server.process.pid, server.engine_pid())


def run_real(kills: int, seed: int) -> Rounds:
    """Kill one of the two processes so many times; only the HTTP process may owe an update."""
    rounds = make_rounds(seed)
    with tempfile.TemporaryDirectory() as name:
        model = make_tiny("llama", Path(name) / "model")
        while rounds.kills < kills:
            with real(model, Path(name)) as target:
                rounds.check(target)
                while rounds.kills < kills - 1 and rounds.rng.random() < 0.6:
                    kill_engine(rounds, target)
                    target = replaced(target)
                rounds.under_load(target, target.http)
        with real(model, Path(name)) as target:
            rounds.check(target)
    return rounds


def kill_engine(rounds: Rounds, target: Target) -> None:
    """Every client learns how its request ended, so that nobody may be charged for more."""
    rounds.under_load(target, target.engine)
    assert [client.open for client in rounds.clients] == [None] * CLIENTS
    before = rounds.surplus
    rounds.check(target)
    assert rounds.surplus == before


def replaced(target: Target) -> Target:
    """The same server once it has another engine."""

    def another() -> bool:
        ready = httpx.get(f"{target.url}/ready").status_code == 200
        engines = engines_of(target.http)
        return ready and len(engines) == 1 and engines != [target.engine]

    eventually(another, seconds=60)
    return Target(target.url, target.http, engine_of(target.http))


RUNS = {"scripted": run_scripted, "real": run_real}


def main(what: str, argument: str) -> None:
    if what == "--child":
        serve_again_and_again(Path(argument))
        return
    rounds = RUNS[what](int(argument), int(os.environ.get("SEED", "1")))
    sys.stdout.write(
        f"{rounds.kills} kills, received {rounds.received()}, of which charged for updates that "
        f"were killed before they were sent: {rounds.surplus}\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
