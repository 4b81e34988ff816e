"""``python -m tests.fuzz.run``: fires many requests, right and wrong, and shows what came of it.

Without ``--url`` it starts a server of its own on a tiny model and watches its processes too. The
last line is one JSON object. Shots are numbered: ``--first 1700 --requests 1`` repeats one.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import httpx
import numpy as np

from ..server.running import RunningServer
from ..server.served import served
from ..server.siege import Books, eventually, gauges
from .campaign import Findings, campaign
from .shots import shot

MODEL_LENGTH = 2048
"""Of the tiny model: what generates up to that is over soon."""

SAMPLE_EVERY = 250
SHOWN = 20


@dataclass(slots=True)
class Holdings:
    """What a server's processes hold over the requests it has answered.

    Attributes:
        server: The server; None for one that somebody else runs.
        memory: (requests, resident bytes of its two processes) as they were.
        books: What they had open half way through: by then every pool of threads is full.
    """

    server: RunningServer | None
    total: int
    memory: list[tuple[int, ...]] = field(default_factory=list)
    books: Books | None = None

    def look(self, requests: int) -> None:
        """Take a sample now and then."""
        if self.server is None or requests % SAMPLE_EVERY:
            return
        pids = (self.server.process.pid, self.server.engine_pid())
        self.memory.append((requests, *map(_resident, pids)))
        if self.books is None and 2 * requests >= self.total:
            self.books = Books.of(self.server)

    def slopes(self) -> list[float]:
        """Bytes per request of each process, over the later three quarters of the run."""
        late = np.array(self.memory[len(self.memory) // 4 :], dtype=np.float64)
        if len(late) < 2:
            return []
        return [float(np.polyfit(late[:, 0], column, 1)[0]) for column in late.T[1:]]

    def check(self) -> None:
        """Nothing runs, no block is in use, and no more is open than half way through.

        Raises:
            AssertionError: Something is.
        """
        if self.server is None:
            return
        server, half_way = self.server, self.books
        eventually(lambda: set(gauges(server).values()) == {0.0}, lambda: gauges(server))
        if half_way is not None:
            eventually(
                lambda: half_way.balance(Books.of(server)), lambda: (half_way, Books.of(server))
            )


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@contextmanager
def own_server() -> Iterator[RunningServer]:
    """A server on a tiny model, in whose log no error may stand."""
    with (
        TemporaryDirectory() as folder,
        served(Path(folder), "--max-model-len", str(MODEL_LENGTH)) as server,
    ):
        yield server
        log = (Path(folder) / "log").read_text()
        assert "ERROR" not in log, log[log.index("ERROR") :][-5000:]


@click.command()
@click.option("--url", help="A running server; by default one is started.")
@click.option("--api-key", help="Sent with each request that brings none of its own.")
@click.option("--requests", default=100_000, show_default=True)
@click.option("--first", default=0, help="Number of the first shot.")
@click.option("--seed", default=0)
def main(url: str | None, api_key: str | None, requests: int, first: int, seed: int) -> None:
    """Fire requests at a server and report what it answered."""
    started = time.perf_counter()
    with own_server() if url is None else nullcontext() as server:
        holdings = Holdings(server, requests)
        target = url or server.url
        numbers = range(first, first + requests)
        found = asyncio.run(campaign(target, seed, numbers, api_key, holdings.look))
        show_faults(found, seed)
        holdings.check()
        ready = httpx.get(f"{target}/ready").status_code
    report = {
        "requests": requests,
        "first": first,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "by_status": found.by_status(),
        "by_kind": {f"{kind} {status}": n for (kind, status), n in sorted(found.statuses.items())},
        "faults": len(found.faults),
        "ready": ready,
        "resident_bytes": holdings.memory[-1][1:] if holdings.memory else [],
        "resident_bytes_per_request": holdings.slopes(),
    }
    click.echo(json.dumps(report))
    sys.exit(1 if found.faults or ready != 200 else 0)


def show_faults(found: Findings, seed: int) -> None:
    """The first of them, with what was sent."""
    for number, fault in found.faults[:SHOWN]:
        made = shot(seed, number)
        click.echo(f"{number}: {fault}: {made.kind} {made.method} {made.path[:100]}")
        click.echo(f"    {made.headers} {made.content[:2000]!r}")


if __name__ == "__main__":
    main()
