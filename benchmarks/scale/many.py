"""All adapters registered: what the traffic of all costs beside that of ten, and a start.

Traffic follows Zipf's law. Runs over all adapters and over ten of them take turns on one server
whose host memory has room for all. The first run over all finds every adapter on disk and is told
apart; the others send the same requests, so that what they ask for is in host memory.
"""

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median

from ..load.popularity import Popularity
from ..load.run import Outcome
from .findings import Bar, Finding, brief, faults, rate
from .fleet import require_disk
from .setup import Option, Setup
from .subject import Resident, Subject, running

FEW = 10
LEAST_RATIO, MOST_START_SECONDS = 0.90, 15.0
_MEMORY_BUDGET = 1 << 30


def measure(setup: Setup, zipf: float) -> Finding:
    """Register all adapters, start again, and let both kinds of traffic take turns.

    Raises:
        BenchmarkError: The server cannot be had or ended.
    """
    options = setup.options(_MEMORY_BUDGET, len(setup.fleet.names) + 1)
    first = _register(setup, options)
    setup.say("many: starting again")
    with running(setup, "many", setup.state_dir, options) as subject:
        start = {
            "first_start_seconds": round(first, 2),
            "start_seconds": round(subject.start_seconds, 2),
            "registered": subject.registered(),
        }
        before = subject.resident()
        cold, rounds = asyncio.run(_rounds(setup, subject, Popularity("zipf", exponent=zipf)))
        lists = {path: subject.seconds_of(path) for path in ("/v1/models", "/metrics")}
        memory = _memory(setup, before, subject.resident())
    lists_ms = {f"{path}_ms": round(1000 * each, 1) for path, each in lists.items()}
    return judge(start | lists_ms, memory, cold, rounds)


def judge(
    start: Mapping[str, float],
    memory: Mapping[str, int],
    cold: Outcome,
    rounds: Sequence[Mapping[str, Outcome]],
) -> Finding:
    """Hold figures to their bars."""
    ratios = [round(rate(each["all"]) / rate(each["few"]), 4) for each in rounds]
    few = median(rate(each["few"]) for each in rounds)
    ratio = round(median(ratios), 4)
    figures = {
        **start,
        "memory": memory,
        "ratio": ratio,
        "ratios": ratios,
        "ratio_while_cold": round(rate(cold) / few, 4),
        "cold": brief(cold),
        "rounds": [{name: brief(each) for name, each in both.items()} for both in rounds],
    }
    bars = (
        Bar(f"tokens/s with all adapters over {FEW}", ratio, LEAST_RATIO, at_least=True),
        Bar("seconds to start with all registered", start["start_seconds"], MOST_START_SECONDS),
        Bar("engine's growth under load, bytes", memory["engine_growth"], memory["budgets"]),
    )
    wrong = [*faults("many, cold", cold.records)]
    for both in rounds:
        wrong += [each for name, run in both.items() for each in faults(name, run.records)]
    return Finding(figures, bars, tuple(wrong))


def _register(setup: Setup, options: Sequence[Option]) -> float:
    """Seconds of a start in which all adapters are new."""
    shutil.rmtree(setup.state_dir, ignore_errors=True)
    require_disk(setup.work_dir, len(setup.fleet.names) * setup.fleet.file_bytes)
    setup.say(f"many: registering {len(setup.fleet.names):,} adapters")
    with running(setup, "many-first", setup.state_dir, options) as subject:
        return subject.start_seconds


async def _rounds(
    setup: Setup, subject: Subject, popularity: Popularity
) -> tuple[Outcome, list[dict[str, Outcome]]]:
    names, size = setup.fleet.names, setup.size
    loads = {
        "few": size.workload(names[:FEW], popularity, "many", warmup=size.streams),
        "all": size.workload(names, popularity, "many"),
    }
    setup.say("many: all adapters, from disk")
    cold = await subject.run(loads["all"])
    rounds = []
    for number in range(1, size.rounds + 1):
        setup.say(f"many: round {number} of {size.rounds}")
        turns = ("few", "all") if number % 2 else ("all", "few")
        rounds.append({name: await subject.run(loads[name]) for name in turns})
    return cold, rounds


def _memory(setup: Setup, before: Resident, after: Resident) -> dict[str, int]:
    host = (len(setup.fleet.names) + 1) * setup.fleet.file_bytes
    return {
        "budgets": _MEMORY_BUDGET + host,
        "engine_growth": after.engine - before.engine,
        **{f"{name}_at_start": each for name, each in asdict(before).items()},
        **{f"{name}_after": each for name, each in asdict(after).items()},
    }
