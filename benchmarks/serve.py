"""Load generator: a closed loop of concurrent streams against a running server.

Every stream sends its next request as soon as its last one ended. A prompt is an exact number of
random token ids, so that no request is helped by another's cached prefix; every request generates
an exact number of tokens. Reported are

- output tokens per second over the whole run,
- TTFT, the time from sending a request to its first token,
- ITL, the inter-token latency: the gap between two arrivals, shared by the tokens of the later one,
- E2E, the time from sending a request to its last token.

The last line of the output is one JSON object. Exits 1 if any request failed.

    python -m deltamux.benchmarks.serve --concurrency 16 --requests 64 --adapters 16
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import httpx
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from .client import Arrival, Request, RequestFailed, open_client, random_prompt, stream
from .machine import describe_machine, describe_versions

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Workload:
    """What is asked of the server; two runs of one workload send the same requests."""

    models: list[str]
    concurrency: int
    requests: int
    warmup: int
    prompt_tokens: int
    output_tokens: int
    first_token_id: int
    last_token_id: int
    seed: int

    def iter_requests(self, phase: str, count: int) -> Iterator[Request]:
        """``count`` requests that take the models in turn; no two phases share a prompt."""
        token_ids = range(self.first_token_id, self.last_token_id + 1)
        for index in range(count):
            prompt = random_prompt(f"{self.seed}/{phase}/{index}", self.prompt_tokens, token_ids)
            yield Request(self.models[index % len(self.models)], prompt, self.output_tokens)


@dataclass(frozen=True)
class Timing:
    """One request: when it was sent and when its tokens arrived, or why it failed."""

    sent: float
    arrivals: list[Arrival]
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0].time - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return self.arrivals[-1].time - self.sent

    def inter_token_latencies(self) -> Iterator[float]:
        """Seconds per token, one value for each token after the first arrival."""
        for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False):
            yield from [(later.time - earlier.time) / later.tokens] * later.tokens


async def measure(client: httpx.AsyncClient, request: Request) -> Timing:
    """Run one request to its end."""
    sent = time.perf_counter()
    try:
        return Timing(sent, [arrival async for arrival in stream(client, request)])
    except (RequestFailed, httpx.HTTPError) as error:
        return Timing(sent, [], f"{type(error).__name__}: {error}")


async def closed_loop(
    client: httpx.AsyncClient,
    requests: Iterator[Request],
    concurrency: int,
    on_done: Callable[[], None],
) -> list[Timing]:
    """Keep ``concurrency`` requests in flight until there are no more."""
    timings: list[Timing] = []

    async def worker() -> None:
        for request in requests:
            timings.append(await measure(client, request))
            on_done()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return timings


async def run(base_url: str, workload: Workload) -> tuple[list[Timing], float]:
    """Warm up, then measure: every request's timing, and the seconds they took together."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    async with open_client(base_url, workload.concurrency) as client:
        with Progress(*columns, console=Console(stderr=True)) as progress:

            async def phase(name: str, count: int) -> list[Timing]:
                task = progress.add_task(name, total=count)
                requests = workload.iter_requests(name, count)
                return await closed_loop(
                    client, requests, workload.concurrency, lambda: progress.advance(task)
                )

            await phase("warm-up", workload.warmup)
            started = time.perf_counter()
            timings = await phase("measure", workload.requests)
            return timings, time.perf_counter() - started


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def summarize(timings: list[Timing], seconds: float) -> dict[str, object]:
    """The run's figures; latencies in milliseconds over the requests that did not fail."""
    good = [timing for timing in timings if timing.error is None]
    tokens = sum(arrival.tokens for timing in good for arrival in timing.arrivals)
    series = {
        "ttft_ms": [timing.ttft for timing in good],
        "itl_ms": [gap for timing in good for gap in timing.inter_token_latencies()],
        "e2e_ms": [timing.e2e for timing in good],
    }
    return {
        "completed": len(good),
        "failed": len(timings) - len(good),
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_second": round(tokens / seconds, 2),
    } | {name: _percentiles(values) for name, values in series.items()}


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    points = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {
        name: None if value is None else round(value * 1000, 3) for name, value in points.items()
    }


def print_table(workload: Workload, result: dict[str, object]) -> None:
    """The figures for a reader."""
    title = (
        f"{len(workload.models)} model(s), {workload.concurrency} streams, "
        f"{workload.prompt_tokens} prompt + {workload.output_tokens} output tokens"
    )
    table = Table("", *(f"p{percent}" for percent in PERCENTILES), title=title)
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        points = result[name]
        assert isinstance(points, dict)
        table.add_row(
            name, *("-" if value is None else f"{value:.1f}" for value in points.values())
        )
    console = Console()
    console.print(table)
    console.print(
        f"{result['output_tokens_per_second']} output tokens/s over {result['seconds']} s; "
        f"{result['completed']} completed, {result['failed']} failed"
    )


def choose_models(base_url: str, adapters: int | None) -> list[str]:
    """The base's name, or the names of the first ``adapters`` adapters the server lists."""
    models = httpx.get(f"{base_url}/v1/models", trust_env=False).raise_for_status().json()["data"]
    if adapters is None:
        return [model["id"] for model in models if model.get("parent") is None][:1]
    names = [model["id"] for model in models if model.get("parent") is not None]
    if len(names) < adapters:
        sys.exit(f"--adapters {adapters}: the server lists {len(names)} adapters; load more first")
    return names[:adapters]


def server_version(base_url: str) -> object:
    """What the server says of its version; None where it has no such route."""
    response = httpx.get(f"{base_url}/version", trust_env=False)
    return response.json() if response.status_code == 200 else None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Closed-loop load generator.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--models", help="names separated by commas, taken in turn (default: the base)"
    )
    which.add_argument(
        "--adapters", type=int, help="take this many of the server's adapters in turn"
    )
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument(
        "--warmup", type=int, help="requests before measuring (default: --concurrency)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--first-token-id", type=int, default=1000)
    parser.add_argument(
        "--last-token-id", type=int, default=30000, help="below the vocabulary's size"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, print the JSON line."""
    arguments = parse_arguments()
    base_url = arguments.base_url.rstrip("/")
    models = arguments.models.split(",") if arguments.models else None
    workload = Workload(
        models=models or choose_models(base_url, arguments.adapters),
        concurrency=arguments.concurrency,
        requests=arguments.requests,
        warmup=arguments.concurrency if arguments.warmup is None else arguments.warmup,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        first_token_id=arguments.first_token_id,
        last_token_id=arguments.last_token_id,
        seed=arguments.seed,
    )
    timings, seconds = asyncio.run(run(base_url, workload))
    result = summarize(timings, seconds)
    print_table(workload, result)
    for error in sorted({timing.error for timing in timings if timing.error}):
        print(f"failed: {error}", file=sys.stderr)
    report = {
        "benchmark": "serve",
        "machine": describe_machine(),
        "versions": describe_versions("httpx", "torch") | {"server": server_version(base_url)},
        "workload": asdict(workload),
        "result": result,
    }
    print(json.dumps(report))
    sys.exit(result["failed"] != 0)


if __name__ == "__main__":
    main()
