"""Serves a base with more and more LoRAs on the GPU, and measures what they cost.

One server has all adapters on the device from the start; each run asks for the base or for the
first few of them in turn. So nothing but the adapters in the batches differs between runs.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from ..server.config import default_state_dir
from ..server.model.source import resolve_model
from .gpu_section import Options, say
from .make_adapters import write_adapters
from .markdown import table

RANK = 16
COUNTS = (0, 1, 8, 32, 128)
STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128, 128
_READY = re.compile(r"ready on (http://\S+)")
_SPARE = 1.25
"""Memory for adapters, beside what their numbers take."""
_LEAST_BUDGET = 4 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the load generator.

    Attributes:
        adapters: Different ones that were asked for; 0 is the bare base.
        completed: Requests.
        failed: Requests.
        tokens_per_second: Output, of all streams together.
        ttft_p50_ms: To the first token.
        ttft_p99_ms: To the first token.
        itl_p50_ms: Between tokens.
        itl_p99_ms: Between tokens.
    """

    adapters: int
    completed: int
    failed: int
    tokens_per_second: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Serving:
    """All runs.

    Attributes:
        base: The model.
        rank: Of the adapters, on all linear modules of the layers.
        adapter_bytes: Of each.
        streams: That send their next request when their last one ended.
        prompt_tokens: Of a request.
        output_tokens: Of a request.
        runs: By number of adapters.
    """

    base: str
    rank: int
    adapter_bytes: int
    streams: int
    prompt_tokens: int
    output_tokens: int
    runs: tuple[Run, ...]

    @property
    def faults(self) -> Sequence[str]:
        """Requests that failed."""
        return [
            f"{each.adapters} adapters: {each.failed} of {each.completed + each.failed} requests"
            " failed"
            for each in self.runs
            if each.failed or not each.completed
        ]


def measure(options: Options) -> Serving:
    """On the current GPU.

    Raises:
        RuntimeError: The server or the load generator broke off.
        ValueError: The base has no module that the adapters could change.
        ModelError: The base is refused.
    """
    folder = resolve_model(options.base, default_state_dir())
    with TemporaryDirectory(dir=options.out) as adapters:
        counts = [each for each in COUNTS if each <= options.most_adapters]
        adapter_bytes = make_adapters(folder, Path(adapters), max(counts), options.seed)
        flags = server_flags(max(counts) * adapter_bytes)
        command = [*flags, "--device", "cuda", "--adapter-dir", adapters]
        with running(options.base, command, options.out / "server.log") as url:
            runs = [run_load(url, count, options) for count in counts]
    return Serving(
        options.base, RANK, adapter_bytes, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, tuple(runs)
    )


def make_adapters(base: Path, folder: Path, count: int, seed: int) -> int:
    """Write LoRAs of random numbers: the bytes of one.

    Raises:
        ValueError: The base has none of the modules.
    """
    say(f"making {count} adapters of rank {RANK} on all linear modules")
    folders = [folder / f"synthetic-{index:03}" for index in range(count)]
    modules = write_adapters(base, folders, [RANK], seed=seed)
    return sum(RANK * (inputs + outputs) * 2 for _, inputs, outputs in modules)


_ADAPTER_SHARE = 0.25
"""Part of the device budget that the adapters take; the rest is left to the cache."""


def server_flags(num_bytes: int) -> list[str]:
    """Budgets that hold all adapters, on the device and on the host."""
    needed = int(_SPARE * num_bytes)
    device = max(int(needed / _ADAPTER_SHARE), _LEAST_BUDGET)
    host = max(needed, _LEAST_BUDGET)
    return ["--memory-budget", str(device), "--host-memory-budget", str(host)]


@contextmanager
def running(model: str, flags: Sequence[str], log: Path) -> Iterator[str]:
    """``deltamux serve`` on a free port: its address, as soon as it is ready.

    Raises:
        RuntimeError: It ended before.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "deltamux", "serve", model, "--port", "0", *flags]
    command += ["--state-dir", str(log.parent / "state")]
    with log.open("w") as written:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=written, text=True, env=environment
        )
        assert process.stdout is not None
        try:
            yield _address(process.stdout, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def run_load(url: str, adapters: int, options: Options) -> Run:
    """One run of ``python -m deltamux.benchmarks.serve``.

    Half as many requests come before it: a shape of step is captured in its second, an adapter
    loaded in its first.

    Raises:
        RuntimeError: It broke off.
    """
    say(f"{adapters} adapters, {STREAMS} streams:")
    flags = {
        "--base-url": url,
        "--concurrency": STREAMS,
        "--requests": options.requests,
        "--warmup": options.requests // 2,
        "--prompt-tokens": PROMPT_TOKENS,
        "--output-tokens": OUTPUT_TOKENS,
        "--seed": options.seed,
        **({"--adapters": adapters} if adapters else {}),
    }
    command = [sys.executable, "-m", "deltamux.benchmarks.serve"]
    done = subprocess.run(
        [*command, *(str(each) for pair in flags.items() for each in pair)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    # 1: some requests failed, and the figures are there.
    if done.returncode not in (0, 1) or not lines:
        raise RuntimeError(f"the load generator ended with {done.returncode}; see above")
    return read_run(adapters, lines[-1])


def read_run(adapters: int, line: str) -> Run:
    """Of the load generator's JSON line."""
    total: dict[str, Any] = json.loads(line)["results"]["total"]
    ttft, itl = total["ttft_ms"], total["itl_ms"]
    return Run(
        adapters=adapters,
        completed=total["completed"],
        failed=total["failed"],
        tokens_per_second=total["output_tokens_per_second"],
        ttft_p50_ms=ttft["p50"],
        ttft_p99_ms=ttft["p99"],
        itl_p50_ms=itl["p50"],
        itl_p99_ms=itl["p99"],
    )


def render(serving: Serving) -> str:
    """Rates and latencies by number of adapters."""
    base = next((each for each in serving.runs if not each.adapters), None)
    rows = [
        (
            str(each.adapters),
            f"{each.tokens_per_second:,.0f}",
            _ratio(each, base),
            *map(_milliseconds, (each.ttft_p50_ms, each.ttft_p99_ms)),
            *map(_milliseconds, (each.itl_p50_ms, each.itl_p99_ms)),
            str(each.failed),
        )
        for each in serving.runs
    ]
    header = (
        *("adapters", "output tokens/s", "of the base's"),
        *("TTFT p50, ms", "p99", "between tokens p50, ms", "p99", "failed"),
    )
    return (
        f"{serving.base}, adapters of rank {serving.rank} on all linear modules"
        f" ({serving.adapter_bytes / 1e6:,.1f} MB each); {serving.streams} streams in a closed"
        f" loop, {serving.prompt_tokens} prompt and {serving.output_tokens} output tokens;"
        f" {max((each.completed + each.failed for each in serving.runs), default=0)} requests a"
        f" run.\n\n"
        f"{table(header, rows)}"
    )


def _address(output: IO[str], log: Path) -> str:
    for line in output:
        if match := _READY.search(line):
            return match[1]
    last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the server ended before it was ready; the end of {log}:\n{last}")


def _ratio(run: Run, base: Run | None) -> str:
    if base is None or not base.tokens_per_second:
        return "-"
    return f"{run.tokens_per_second / base.tokens_per_second:.3f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
