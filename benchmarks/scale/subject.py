"""The server under measurement: started as a user would, asked what it holds, weighed."""

import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from ..compare.process import Process
from ..errors import BenchmarkError
from ..load.run import Outcome, run
from ..load.workload import Workload
from ..swap_soak import own_resident_bytes, resident_bytes
from .setup import BASE, Option, Setup

_SILENCE_SECONDS = 300.0
_START_SECONDS, _POLL_SECONDS = 900.0, 0.1
_READY = re.compile(r"ready on (http://\S+)")


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident bytes of the server's two processes; helpers count with the engine."""

    http: int
    engine: int


@dataclass(frozen=True, slots=True)
class Subject:
    """A running server.

    Attributes:
        process: Of it.
        url: Where it listens.
        start_seconds: From its start until it was ready.
    """

    process: Process
    url: str
    start_seconds: float

    async def run(self, workload: Workload) -> Outcome:
        """Send a workload.

        Raises:
            BenchmarkError: The server ended.
        """
        outcome = await run(self.url, workload, _SILENCE_SECONDS)
        if self.process.ended():
            raise BenchmarkError(f"the server {self.process.obituary()}")
        return outcome

    def resident(self) -> Resident:
        """What it takes now."""
        http = own_resident_bytes(self.process.pid)
        return Resident(http, resident_bytes(self.process.pid) - http)

    def loaded(self) -> Mapping[str, frozenset[str]]:
        """Names of the adapters in memory by tier: ``gpu`` is the device, ``cpu`` the host."""
        names = defaultdict(set)
        for labels, _ in self._samples("vllm:lora_adapter_loaded"):
            names[labels["level"]].add(labels["adapter_name"])
        return {level: frozenset(names[level]) for level in ("gpu", "cpu")}

    def registered(self) -> int:
        """Adapters it serves."""
        return sum(int(value) for _, value in self._samples("deltamux:adapters_registered"))

    def resident_adapters(self) -> Mapping[str, int]:
        """Adapters in memory by tier, those that no name stands for any more too."""
        samples = self._samples("deltamux:adapters_in_memory")
        return {labels["level"]: int(value) for labels, value in samples}

    def store_bytes(self) -> int:
        """Disk that the store's copies take."""
        return sum(int(value) for _, value in self._samples("deltamux:adapter_store_bytes"))

    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache so far."""
        return sum(int(value) for _, value in self._samples("vllm:prefix_cache_hits"))

    def seconds_of(self, path: str) -> float:
        """How long it takes to answer a GET."""
        started = time.perf_counter()
        self._get(path)
        return time.perf_counter() - started

    def host_bytes(self) -> Mapping[str, int]:
        """Bytes of each adapter's default version in host memory, there or not."""
        cards = self._get("/v1/adapters?limit=100000").json()["data"]
        return {card["name"]: card["info"]["num_bytes"] for card in cards if card["info"]}

    def _samples(self, family: str) -> Iterator[tuple[Mapping[str, str], float]]:
        for each in text_string_to_metric_families(self._get("/metrics").text):
            if each.name == family:
                yield from ((sample.labels, sample.value) for sample in each.samples)

    def _get(self, path: str) -> httpx.Response:
        try:
            return httpx.get(self.url + path, timeout=60, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            raise BenchmarkError(f"GET {path}: {type(error).__name__}: {error}") from error


@contextmanager
def running(
    setup: Setup, log: str, state_dir: Path, options: Sequence[Option]
) -> Iterator[Subject]:
    """A server of the base that is gone when the block is left.

    Raises:
        BenchmarkError: It does not start.
    """
    command: list[Option] = [sys.executable, "-m", "deltamux", "serve", setup.base]
    command += ["--port", "0", "--served-model-name", BASE, "--state-dir", state_dir, *options]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["OMP_NUM_THREADS"] = str(setup.threads)
    logs = setup.work_dir / "logs"
    logs.mkdir(exist_ok=True)
    started = time.monotonic()
    process = Process(command, logs / f"{log}.log", env)
    try:
        url = _url_when_ready(process)
        yield Subject(process, url, time.monotonic() - started)
    finally:
        process.end()


def _url_when_ready(process: Process) -> str:
    """The address that it says it is ready on: it chooses the port, so that no other has it."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        said = _READY.search(process.log.read_text(errors="replace"))
        if said is not None:
            return said[1]
        if process.ended() or time.monotonic() > deadline:
            raise BenchmarkError(f"the server did not start: {process.obituary()}")
        time.sleep(_POLL_SECONDS)
