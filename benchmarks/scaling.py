"""Throughput over the number of streams and of different adapters, of a running server.

    python -m deltamux.benchmarks.scaling [--base-url URL] [--most 64] [--rounds N] [--plot FILE]

The server must list as many adapters as the most streams, and hold them all on the device. Three
curves: streams for the base, as many streams as adapters, and the most streams over ever more
adapters. The points of a round are measured in turn, every other round backwards, and reported as
medians. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from matplotlib.figure import Figure

from .load.arrivals import Closed
from .load.lengths import Lengths
from .load.popularity import Popularity
from .load.results import Objective, evaluate
from .load.run import run
from .load.served import ask_server
from .load.workload import Workload
from .machine import describe_machine, describe_versions
from .markdown import table

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
TOKEN_IDS = range(1000, 30000)
TIMEOUT_SECONDS = 600.0
CURVES = ("base", "as many adapters as streams", "adapters at the most streams")


@dataclass(frozen=True, slots=True)
class Point:
    """One closed loop.

    Attributes:
        curve: Of ``CURVES``.
        streams: In flight at any time.
        adapters: Different ones, asked for in turn; 0 for the base.
    """

    curve: str
    streams: int
    adapters: int

    @property
    def across(self) -> int:
        """Where the point stands on its curve."""
        return self.adapters if self.curve == CURVES[2] else self.streams


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the rounds.

    Attributes:
        point: What was measured.
        tokens_per_second: Of output.
        itl_ms: Inter-token latency, p50.
        ttft_ms: Time to the first token, p50.
    """

    point: Point
    tokens_per_second: float
    itl_ms: float
    ttft_ms: float


def points(most: int) -> Iterator[Point]:
    """Powers of two up to ``most``."""
    steps = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    for streams in steps:
        yield Point(CURVES[0], streams, 0)
        yield Point(CURVES[1], streams, streams)
    for adapters in steps:
        yield Point(CURVES[2], steps[-1], adapters)


def workload_of(
    point: Point, base: str, adapters: tuple[str, ...], requests_per_stream: int, seed: int
) -> Workload:
    """The requests of one run; no two runs share a prompt."""
    return Workload(
        models=adapters[: point.adapters] if point.adapters else (base,),
        base=base,
        load=Closed(point.streams),
        requests=max(8, point.streams * requests_per_stream),
        seconds=None,
        warmup=max(point.streams, point.adapters),
        popularity=Popularity("turns"),
        prompts=Lengths(PROMPT_TOKENS, PROMPT_TOKENS),
        outputs=Lengths(OUTPUT_TOKENS, OUTPUT_TOKENS),
        token_ids=TOKEN_IDS,
        seed=Random(f"{seed}/{point}").randrange(1 << 31),
    )


def measure(url: str, all_points: Sequence[Point], options: argparse.Namespace) -> list[Measured]:
    """Every point in every round."""
    served = ask_server(url, None)
    if served.base is None or len(served.adapters) < options.most:
        raise SystemExit(f"{url} lists no base, or fewer than {options.most} adapters")
    found: dict[Point, list[tuple[float, ...]]] = {point: [] for point in all_points}
    for number in range(options.rounds):
        for point in all_points if number % 2 == 0 else reversed(all_points):
            workload = workload_of(
                point, served.base, served.adapters, options.requests_per_stream, number
            )
            total = evaluate(asyncio.run(run(url, workload, TIMEOUT_SECONDS)), Objective({})).total
            if total.failed:
                raise SystemExit(f"{total.failed} requests failed at {point}")
            rate = total.output_tokens_per_second
            found[point].append((rate, total.itl_ms.p50 or 0.0, total.ttft_ms.p50 or 0.0))
            print(f"round {number + 1}: {point}: {rate:.0f} tokens/s", file=sys.stderr)
    return [
        Measured(point, *(statistics.median(column) for column in zip(*rows, strict=True)))
        for point, rows in found.items()
    ]


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Throughput and inter-token latency of the three curves."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for curve in CURVES:
        chosen = [each for each in measured if each.point.curve == curve]
        across = [each.point.across for each in chosen]
        panels[0].plot(across, [each.tokens_per_second for each in chosen], "o-", label=curve)
        panels[1].plot(across, [each.itl_ms for each in chosen], "o-", label=curve)
    for axes, title in zip(
        panels, ("output tokens/s", "inter-token latency, p50 (ms)"), strict=True
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(across, [str(each) for each in across])
        axes.set_xlabel("streams, or adapters at the most streams")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--most", type=int, default=64, help="streams and adapters")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="a PNG file")
    options = parser.parse_args()
    measured = measure(options.base_url, list(points(options.most)), options)
    rows = [
        [
            each.point.curve,
            str(each.point.streams),
            str(each.point.adapters),
            f"{each.tokens_per_second:.0f}",
            f"{each.itl_ms:.1f}",
            f"{each.ttft_ms:.0f}",
        ]
        for each in measured
    ]
    headings = ["curve", "streams", "adapters", "tokens/s", "ITL p50, ms", "TTFT p50, ms"]
    print(table(headings, rows))
    if options.plot is not None:
        draw(measured, options.plot)
    report = {
        "benchmark": "scaling",
        "machine": describe_machine(),
        "versions": describe_versions("deltamux", "httpx"),
        "workload": {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS},
        "rounds": options.rounds,
        "results": [asdict(each) for each in measured],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
