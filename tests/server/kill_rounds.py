"""Kills a registry at random points of registration, upload and reload, and looks at what is left.

The child changes a registry as fast as it can and says on its standard output what it began and
what was acknowledged; the parent ends it with SIGKILL at a random moment. What was acknowledged
must be there, what was only begun may be, and every content must be whole.

    python -m tests.server.kill_rounds 100
"""

import asyncio
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deltamux.adapters.folder import hash_folder
from deltamux.server.composition import Room
from deltamux.server.engine.messages import AdapterInfo
from deltamux.server.store.registry import AdapterRegistry
from deltamux.server.store.wanted import Wanted

from .fake_store import files_in, open_registry, write_adapter
from .hostile_archives import tar

NAMES = ("a", "b", "c", "d")
KEEP = 3


class AcceptingEngine:
    """Takes every adapter, once its files hash to what they should."""

    async def load_adapter(self, adapter_id: int, path: str, digest: str | None) -> AdapterInfo:
        found = hash_folder(Path(path))
        assert found == digest, "half an adapter was served"
        return AdapterInfo(found, "lora", "peft", 8, 1000, 4000, ["q_proj"])

    async def unload_adapter(self, adapter_id: int) -> None:
        pass

    def pin_adapter(self, adapter_id: int, pinned: bool) -> None:
        pass


def say(kind: str, change: dict) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **change}) + "\n")
    sys.stdout.flush()


async def change_for_ever(folder: Path, seed: int) -> None:
    """The child: random changes, one after another."""
    random.seed(seed)
    with open_registry(folder / "state", AcceptingEngine(), keep_versions=KEEP) as registry:
        await registry.open()
        say("open", {})
        for number in range(10**9):
            await change_once(registry, folder, f"{seed}-{number}")


async def change_once(registry: AdapterRegistry, folder: Path, label: str) -> None:
    name = random.choice(NAMES)
    known = registry.catalog.find(name)
    what = random.choice(["load", "load", "upload", "upload", "rollback", "pin", "remove"])
    if what in ("rollback", "remove", "pin") and (known is None or known.earlier() is None):
        what = "load"
    change = {"name": name, "what": what, "label": label}
    say("begin", change)
    if what == "load":
        source = write_adapter(folder / "source" / name, label, size=20_000)
        adapter = await registry.add(Wanted(name, str(source), replace=True))
    elif what == "upload":
        source = write_adapter(folder / "upload", label, size=20_000)
        raw = tar(tuple((path.name, path.read_bytes()) for path in source.iterdir()))
        adapter = await registry.add_archive(Wanted(name, replace=True), io.BytesIO(raw))
    elif what == "rollback":
        adapter = await registry.set_default(name, None)
    elif what == "pin":
        adapter = await registry.set_pinned(name, not known.pinned, Room(1 << 30, 1 << 30, 99))
    else:
        await registry.remove(name)
        adapter = None
    say("done", change | {"left": adapter and [adapter.default_digest, adapter.pinned]})


@dataclass
class Book:
    """What the registry must hold: by name, the states that it may be found in."""

    certain: dict[str, list | None] = field(default_factory=dict)
    begun: dict | None = None

    def take(self, line: dict) -> None:
        if line["kind"] == "begin":
            self.begun = line
        elif line["kind"] == "done":
            self.certain[line["name"]] = line["left"]
            self.begun = None


@contextmanager
def running_child(folder: Path, seed: int):
    command = [sys.executable, "-m", "tests.server.kill_rounds", "--child", str(folder), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        yield child


def kill_at_random(folder: Path, seed: int, book: Book, rng: random.Random) -> int:
    """One round; how many changes were acknowledged."""
    with running_child(folder, seed) as child:
        assert json.loads(child.stdout.readline())["kind"] == "open"
        time.sleep(rng.uniform(0.0, 0.25))  # the moment of the kill is the point of the test
        child.send_signal(signal.SIGKILL)
        lines = [json.loads(line) for line in child.stdout.read().splitlines() if line[-1:] == "}"]
    for line in lines:
        book.take(line)
    return sum(line["kind"] == "done" for line in lines)


async def check(folder: Path, book: Book) -> None:
    """Open what is left and compare it with the book, which becomes certain of it."""
    with open_registry(folder / "state", AcceptingEngine(), keep_versions=KEEP) as registry:
        await registry.open()
        for name in NAMES:
            adapter = registry.catalog.find(name)
            found = None if adapter is None else [adapter.default_digest, adapter.pinned]
            if book.begun is None or book.begun["name"] != name:
                assert found == book.certain.get(name), (name, book)
            book.certain[name] = found
            for version in () if adapter is None else adapter.versions:
                assert hash_folder(Path(version.path)) == version.digest
                await registry.residents.ensure(version, name)
        root = folder / "state" / "adapters"
        held = {path.name for path in (root / "contents").iterdir()}
        assert held == registry.catalog.digests()
        assert files_in(root / "staging") == []
        await registry.close()
    book.begun = None


def run(rounds: int, seed: int) -> int:
    """Kill so many times; how many changes were acknowledged in all."""
    rng, book, acknowledged = random.Random(seed), Book(), 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            acknowledged += kill_at_random(Path(folder), seed * 1000 + number, book, rng)
            asyncio.run(check(Path(folder), book))
    return acknowledged


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        asyncio.run(change_for_ever(Path(sys.argv[2]), int(sys.argv[3])))
    else:
        sys.stdout.write(f"{run(int(sys.argv[1]), seed=1)} acknowledged changes, all there\n")
