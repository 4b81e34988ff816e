"""Soak test of hot swap: load, use and unload an adapter many times while other requests run.

Background streams run without a pause over the given models. Every cycle loads the adapter under a
new name, starts a request on it, unloads it after its first token and waits for its last: a request
in flight keeps the adapter it started with. The resident memory of the server's processes is
sampled after every cycle; its slope over the second half tells a leak from a cache that fills up.
Start the server with a ``--memory-budget`` that the first half can fill: the KV cache is touched
page by page for the first time as long as there are blocks no request has used.

With ``--reload`` every cycle instead loads changed files under one name in place, each a new
version of it: ``--cycles 1000`` shows whether memory stays flat while versions come and go.

The last line of the output is one JSON object. Exits 1 if any request failed.

    python -m deltamux.benchmarks.swap_soak --adapter examples/adapters/pirate --models smollm2 \
        --pid <the server's> --reload --cycles 1000
"""

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from rich.console import Console
from rich.progress import track

from .client import Request, RequestFailed, open_client, random_prompt, stream
from .machine import describe_machine, describe_versions

TOKEN_IDS = range(1000, 30000)


@dataclass(frozen=True)
class Soak:
    """The workload: how many cycles against which background."""

    adapter: str
    models: list[str]
    streams: int
    cycles: int
    prompt_tokens: int
    output_tokens: int
    seed: int
    reload: bool = False

    def request(self, model: str, index: str) -> Request:
        """A request whose prompt no other request of the run shares."""
        prompt = random_prompt(f"{self.seed}/{index}", self.prompt_tokens, TOKEN_IDS)
        return Request(model, prompt, self.output_tokens)


@dataclass
class Tally:
    """What happened so far."""

    completed: int = 0
    errors: list[str] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)


async def background(client: httpx.AsyncClient, soak: Soak, offset: int, tally: Tally) -> None:
    """One stream of requests over the models in turn, until cancelled."""
    index = 0
    while True:
        model = soak.models[(offset + index) % len(soak.models)]
        request = soak.request(model, f"background/{offset}/{index}")
        try:
            async for _ in stream(client, request):
                pass
            tally.completed += 1
        except (RequestFailed, httpx.HTTPError) as error:
            tally.errors.append(f"{model}: {type(error).__name__}: {error}")
        index += 1


async def cycle(client: httpx.AsyncClient, soak: Soak, index: int) -> None:
    """Load the adapter, start a request on it, unload it under the request, see the request end."""
    name = f"soak-{index}"
    await _post(client, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": soak.adapter})
    arrivals = stream(client, soak.request(name, f"cycle/{index}"))
    if await anext(arrivals, None) is None:
        raise RequestFailed(f"{name}: the stream ended before its first token")
    await _post(client, "/v1/unload_lora_adapter", {"lora_name": name})
    async for _ in arrivals:
        pass


async def reload_cycle(client: httpx.AsyncClient, soak: Soak, index: int, folder: Path) -> None:
    """Change the files in ``folder``, load them in place under a request, see the request end."""
    name = "soak-reload"
    arrivals = None if index == 0 else stream(client, soak.request(name, f"cycle/{index}"))
    if arrivals is not None and await anext(arrivals, None) is None:
        raise RequestFailed(f"{name}: the stream ended before its first token")
    write_version(Path(soak.adapter), folder, index)
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    await _post(client, "/v1/load_lora_adapter", body)
    if arrivals is not None:
        async for _ in arrivals:
            pass


def write_version(source: Path, folder: Path, number: int) -> None:
    """Copy an adapter with a number in its configuration: other contents of the same size."""
    for path in source.iterdir():
        if path.name == "adapter_config.json":
            fields = json.loads(path.read_text()) | {"revision": f"{number:09}"}
            (folder / path.name).write_text(json.dumps(fields))
        else:
            shutil.copyfile(path, folder / path.name)


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> None:
    response = await client.post(path, json=body)
    if response.status_code != 200:
        raise RequestFailed(f"{path}: HTTP {response.status_code}: {response.text[:300]}")


async def run(base_url: str, soak: Soak, pid: int) -> Tally:
    """All cycles, one after another, under background traffic."""
    tally = Tally(resident_bytes=[resident_bytes(pid)])
    with TemporaryDirectory() as folder:
        await _run_cycles(base_url, soak, pid, tally, Path(folder))
    return tally


async def _run_cycles(base_url: str, soak: Soak, pid: int, tally: Tally, folder: Path) -> None:
    async with open_client(base_url) as client, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(background(client, soak, index, tally))
            for index in range(soak.streams)
        ]
        for index in track(range(soak.cycles), "swapping", console=Console(stderr=True)):
            try:
                if soak.reload:
                    await reload_cycle(client, soak, index, folder)
                else:
                    await cycle(client, soak, index)
                tally.completed += 1
            except (RequestFailed, httpx.HTTPError) as error:
                tally.errors.append(f"cycle {index}: {type(error).__name__}: {error}")
            tally.resident_bytes.append(resident_bytes(pid))
        for task in tasks:
            task.cancel()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and of all its descendants."""
    return own_resident_bytes(pid) + sum(resident_bytes(child) for child in _children(pid))


def own_resident_bytes(pid: int) -> int:
    """Resident memory of a process alone."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _children(pid: int) -> list[int]:
    """Children of every thread: a process may start others from any of them."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def slope(values: Sequence[float]) -> float:
    """Least-squares growth per step; 0 for fewer than two values."""
    mean_x, mean_y = (len(values) - 1) / 2, sum(values) / max(len(values), 1)
    spread = sum((x - mean_x) ** 2 for x in range(len(values)))
    if not spread:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values)) / spread


def summarize(tally: Tally) -> dict[str, object]:
    """The run's figures; memory in bytes."""
    memory = tally.resident_bytes
    middle = len(memory) // 2
    return {
        "completed": tally.completed,
        "failed": len(tally.errors),
        "resident_bytes_before": memory[0],
        "resident_bytes_middle": memory[middle],
        "resident_bytes_after": memory[-1],
        "resident_bytes_per_cycle": round(slope(memory[middle:]), 1),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Hot-swap soak test.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--pid", type=int, required=True, help="the server; its children are counted"
    )
    parser.add_argument("--adapter", type=Path, required=True, help="folder to load and unload")
    parser.add_argument(
        "--models", required=True, help="names separated by commas, for the traffic"
    )
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--reload", action="store_true", help="new versions of one name instead of new names"
    )
    return parser.parse_args()


def main() -> None:
    """Soak, print the figures, print the JSON line."""
    arguments = parse_arguments()
    soak = Soak(
        adapter=str(arguments.adapter.resolve()),
        models=arguments.models.split(","),
        streams=arguments.streams,
        cycles=arguments.cycles,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        seed=arguments.seed,
        reload=arguments.reload,
    )
    tally = asyncio.run(run(arguments.base_url.rstrip("/"), soak, arguments.pid))
    result = summarize(tally)
    for name, value in result.items():
        print(f"{name:26} {value:>16,}")
    for error in tally.errors[:10]:
        print(f"failed: {error}", file=sys.stderr)
    report = {
        "benchmark": "swap_soak",
        "machine": describe_machine(),
        "versions": describe_versions("deltamux", "torch", "httpx"),
        "workload": asdict(soak) | {"adapter": arguments.adapter.name},
        "result": result,
    }
    print(json.dumps(report))
    sys.exit(bool(tally.errors))


if __name__ == "__main__":
    main()
