"""What a tenant gets of a server beside others: latency beside a flood, and service by weight.

    python -m deltamux.benchmarks.fairness [--base smollm2] [--seconds 120] [--out build/fairness]

Starts its own servers, with a tenants file and synthetic LoRAs, and asks three questions:

- *Latency.* A steady tenant sends short prompts at a rate well below its share, over a few
  adapters. Beside it a flood of equal weight keeps ``FLOOD`` times as many requests in flight as
  its share of the seats, with long prompts over 100 adapters. The steady one's latencies beside
  the flood are compared with those of the same requests without it: on the same server (the whole
  machine, of which its load takes little), and on its share of the machine: a server with half the
  cores, half the seats and half the memory.
- *Service of equal tenants* whose requests have unequal sizes, all with more requests than they
  get: Jain's index of it.
- *Service by weight*, 1 : 2 : 4, and how far it is from that.

Service is 1 for a prompt token and 2 for one of output, as the server counts it. The load generator
runs beside the server and takes a part of the same cores. The last line is one JSON object.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from ..server.config import default_state_dir, parse_bytes
from ..server.model.source import resolve_model
from .gpu_serving import running
from .load.arrivals import Closed, Gamma, Load
from .load.lengths import Lengths
from .load.popularity import Popularity
from .load.results import Latencies, latencies
from .load.run import Outcome, Record, run
from .load.workload import Workload
from .machine import describe_machine, describe_versions
from .make_adapters import write_adapters
from .markdown import table

FLOOD = 50
"""Requests that the flood keeps in flight, over those that its share of the seats takes."""
FLOOD_ADAPTERS, STEADY_ADAPTERS = 100, 4
STEADY, LONG = (Lengths(64, 64), Lengths(32, 32)), (Lengths(256, 512), Lengths(16, 64))
SIZES = {"a": (384, 8), "b": (16, 64), "c": (96, 32), "d": (192, 16)}
WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}
RANK, TARGETS = 8, ["q_proj", "v_proj"]
TOKEN_IDS = range(1000, 30000)
SILENCE_SECONDS = 600.0
SETTLING = 0.25
"""Part of a run of several tenants that is not counted."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured.

    Attributes:
        base: As ``deltamux serve`` takes it.
        seconds: Of each run.
        rate: Requests of the steady tenant in a second.
        seats: ``--max-num-seqs`` of the whole server.
        memory: ``--memory-budget`` of it, bytes.
        out: Folder for adapters, logs and state.
        seed: Of all that is drawn.
    """

    base: str
    seconds: float
    rate: float
    seats: int
    memory: int
    out: Path
    seed: int


@dataclass(frozen=True, slots=True)
class Steady:
    """The steady tenant's latencies, in milliseconds; gaps are between tokens."""

    requests: int
    failed: int
    ttft: Latencies
    gaps: Latencies


def key_of(tenant: str) -> str:
    """The tenant's API key: no secret, the server listens on this machine alone."""
    return f"fairness-{tenant}"


def tenants_file(folder: Path) -> Path:
    """Everybody who takes part, in a file for ``--tenants``."""
    weights = {"steady": 1.0, "flood": 1.0, **dict.fromkeys(SIZES, 1.0), **WEIGHTS}
    digests = {name: hashlib.sha256(key_of(name).encode()).hexdigest() for name in weights}
    admin = hashlib.sha256(key_of("admin").encode()).hexdigest()
    content = {
        "admin_keys": [f"sha256:{admin}"],
        "tenants": [
            {"name": name, "keys": [f"sha256:{digests[name]}"], "adapters": ["*"], "weight": weight}
            for name, weight in weights.items()
        ],
    }
    path = folder / "tenants.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@contextmanager
def server(options: Options, part: float, tenants: Path, adapters: Path) -> Iterator[str]:
    """A server on a part of the cores, seats and memory: its address."""
    cores = sorted(os.sched_getaffinity(0))
    folder = options.out / f"part-{part:g}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = {
        "--tenants": tenants,
        "--adapter-dir": adapters,
        "--max-num-seqs": max(1, int(part * options.seats)),
        "--memory-budget": int(part * options.memory),
    }
    os.sched_setaffinity(0, cores[: max(1, int(part * len(cores)))])
    try:
        words = [str(each) for pair in flags.items() for each in pair]
        with running(options.base, words, folder / "server.log") as url:
            os.sched_setaffinity(0, cores)  # of this process; the server keeps what it began with
            yield url
    finally:
        os.sched_setaffinity(0, cores)


def workload(
    options: Options,
    tenant: str,
    models: Sequence[str],
    load: Load,
    sizes: tuple[Lengths, Lengths],
) -> Workload:
    """A tenant's requests; no two tenants share a prompt."""
    seed = int.from_bytes(hashlib.sha256(f"{options.seed}/{tenant}".encode()).digest()[:4])
    return Workload(
        models=tuple(models),
        base=None,
        load=load,
        requests=None,
        seconds=options.seconds,
        warmup=len(models) if tenant == "steady" else 0,
        popularity=Popularity("turns"),
        prompts=sizes[0],
        outputs=sizes[1],
        token_ids=TOKEN_IDS,
        keys={tenant: key_of(tenant)},
        seed=seed,
    )


def steady_workload(options: Options) -> Workload:
    """Short prompts at a steady rate."""
    models = [f"steady-{index}" for index in range(STEADY_ADAPTERS)]
    return workload(options, "steady", models, Gamma(options.rate), STEADY)


def flood_workload(options: Options) -> Workload:
    """Long prompts, and always more of them than can run."""
    models = [f"flood-{index:03}" for index in range(FLOOD_ADAPTERS)]
    return workload(options, "flood", models, Closed(FLOOD * options.seats // 2), LONG)


async def steady_alone(url: str, options: Options) -> Steady:
    """The steady tenant without anybody."""
    return summarize(await run(url, steady_workload(options), SILENCE_SECONDS))


async def steady_beside_flood(url: str, options: Options) -> Steady:
    """The steady tenant while the flood goes on; the flood is there before and after."""
    flood = asyncio.create_task(run(url, flood_workload(options), SILENCE_SECONDS))
    await asyncio.sleep(options.seconds / 8)
    try:
        outcome = await run(url, steady_workload(options), SILENCE_SECONDS)
        if flood.done():
            raise RuntimeError("the flood ended before the steady tenant did")
    finally:
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)
    return summarize(outcome)


def summarize(outcome: Outcome) -> Steady:
    """The latencies of what was answered."""
    good = [record for record in outcome.records if record.error is None]
    gaps = [record.gaps() for record in good]
    return Steady(
        requests=len(good),
        failed=len(outcome.records) - len(good),
        ttft=latencies([record.ttft for record in good]),
        gaps=latencies(np.concatenate(gaps) if gaps else []),
    )


async def service_of(
    url: str, options: Options, base: str, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """Service of each tenant, where each always has more requests than it gets."""
    runs = {
        tenant: run(
            url,
            workload(
                options,
                tenant,
                [base],
                Closed(2 * options.seats),
                (Lengths(prompt, prompt), Lengths(output, output)),
            ),
            SILENCE_SECONDS,
        )
        for tenant, (prompt, output) in sizes.items()
    }
    outcomes = await asyncio.gather(*runs.values())
    window = SETTLING * options.seconds, options.seconds
    return {
        tenant: sum(service(record, *window) for record in outcome.records)
        for tenant, outcome in zip(runs, outcomes, strict=True)
    }


def service(record: Record, start: float, end: float) -> float:
    """What a request was given between two times: 1 for a prompt token, 2 for one of output."""
    if record.error is not None:
        raise RuntimeError(f"a request of {record.tenant} failed: {record.error}")
    within = (record.times >= start) & (record.times < end)
    prompt = (record.prompt_tokens or 0) if within.size and within[0] else 0
    return float(prompt + 2 * record.tokens[within].sum())


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 where all are equal, 1 / n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def ratios(beside: Steady, alone: Steady) -> dict[str, float | None]:
    """How many times as long it takes beside the flood."""
    pairs = {
        "ttft_p50": (beside.ttft.p50, alone.ttft.p50),
        "ttft_p99": (beside.ttft.p99, alone.ttft.p99),
        "gap_mean": (beside.gaps.mean, alone.gaps.mean),
        "gap_p50": (beside.gaps.p50, alone.gaps.p50),
        "gap_p99": (beside.gaps.p99, alone.gaps.p99),
    }
    return {name: round(a / b, 3) if a and b else None for name, (a, b) in pairs.items()}


def measure(options: Options) -> dict[str, object]:
    """All runs."""
    options.out.mkdir(parents=True, exist_ok=True)
    adapters, tenants = options.out / "adapters", tenants_file(options.out)
    names = [f"steady-{index}" for index in range(STEADY_ADAPTERS)]
    names += [f"flood-{index:03}" for index in range(FLOOD_ADAPTERS)]
    base = resolve_model(options.base, default_state_dir())
    write_adapters(base, [adapters / name for name in names], [RANK], targets=TARGETS)
    with server(options, 0.5, tenants, adapters) as url:
        share = say("alone, on its share", asyncio.run(steady_alone(url, options)))
    with server(options, 1.0, tenants, adapters) as url:
        alone = say("alone, on the whole machine", asyncio.run(steady_alone(url, options)))
        beside = say("beside the flood", asyncio.run(steady_beside_flood(url, options)))
        equal = asyncio.run(service_of(url, options, options.base, SIZES))
        same = dict.fromkeys(WEIGHTS, (96, 32))
        weighted = asyncio.run(service_of(url, options, options.base, same))
    per_weight = {name: weighted[name] / weight for name, weight in WEIGHTS.items()}
    mean = sum(per_weight.values()) / len(per_weight)
    return {
        "alone_on_its_share": asdict(share),
        "alone_on_the_machine": asdict(alone),
        "beside_the_flood": asdict(beside),
        "beside_over_its_share": ratios(beside, share),
        "beside_over_the_machine": ratios(beside, alone),
        "service_of_equal_tenants": equal,
        "jain": round(jain(list(equal.values())), 4),
        "service_by_weight": weighted,
        "largest_deviation_from_weights": round(
            max(abs(value / mean - 1) for value in per_weight.values()), 4
        ),
    }


def say(what: str, steady: Steady) -> Steady:
    """Print a run as a table's row."""
    points = [steady.ttft.p50, steady.ttft.p99, steady.gaps.mean, steady.gaps.p50, steady.gaps.p99]
    row = [what, str(steady.requests), str(steady.failed)]
    row += ["-" if each is None else f"{each:.1f}" for each in points]
    header = ("steady tenant", "requests", "failed", "TTFT p50, ms", "p99")
    print(table([*header, "gap mean, ms", "p50", "p99"], [row]), file=sys.stderr)
    return steady


def parse_arguments() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each run")
    parser.add_argument("--rate", type=float, default=0.5, help="steady requests in a second")
    parser.add_argument("--seats", type=int, default=16, help="--max-num-seqs of the server")
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("2GiB"))
    parser.add_argument("--out", type=Path, default=Path("build/fairness"))
    parser.add_argument("--seed", type=int, default=0)
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Measure, print the figures, print the JSON line."""
    options = parse_arguments()
    result = measure(options)
    for name in ("beside_over_its_share", "beside_over_the_machine", "jain"):
        print(f"{name}: {result[name]}")
    print(f"largest deviation from weights: {result['largest_deviation_from_weights']:}")
    report = {
        "benchmark": "fairness",
        "machine": describe_machine(),
        "versions": describe_versions("deltamux", "torch", "httpx"),
        "workload": asdict(options)
        | {"out": options.out.name, "flood": FLOOD, "flood_adapters": FLOOD_ADAPTERS},
        "result": result,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
