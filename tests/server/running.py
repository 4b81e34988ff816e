"""A deltamux server in a process of its own, as a user would start it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deltamux.server.grammar.judge import PROCESS_NAME

_READY = re.compile(r"ready on (http://\S+)")


@dataclass(frozen=True)
class RunningServer:
    url: str
    process: subprocess.Popen

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def children(self) -> list[int]:
        """Process ids of the server's children."""
        return children_of(self.process.pid)

    def engine_pid(self) -> int:
        """Process id of the engine."""
        return engine_of(self.process.pid)


def children_of(pid: int) -> list[int]:
    """Process ids of a server's children."""
    tasks = Path(f"/proc/{pid}/task")
    return [
        int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()
    ]


def engines_of(pid: int) -> list[int]:
    """Process ids of a server's engines: multiprocessing started them, and they are not the judge.

    For a moment after one was killed there is none.
    """
    return [
        child
        for child in children_of(pid)
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        and Path(f"/proc/{child}/comm").read_text().strip() != PROCESS_NAME
    ]


def engine_of(pid: int) -> int:
    """Process id of a server's only engine."""
    [engine] = engines_of(pid)
    return engine


@contextmanager
def running_server(
    model: Path | str, *options: str, log: Path, **env: str
) -> Iterator[RunningServer]:
    """Start ``deltamux serve``, wait until it says it is ready, stop it with SIGTERM."""
    # A state folder of its own, so that no server has what another registered.
    state = ["--state-dir", str(log.parent / "state")]
    command = [sys.executable, "-m", "deltamux", "serve", str(model), "--port", "0"]
    command += [*([] if "--state-dir" in options else state), *options]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **env},
        )
        try:
            yield RunningServer(_wait_until_ready(process, log), process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def _wait_until_ready(process: subprocess.Popen, log: Path) -> str:
    for line in process.stdout:
        if match := _READY.search(line):
            return match[1]
    raise AssertionError(f"the server ended with {process.wait()}:\n{log.read_text()}")
