"""More live adapters than the device holds: what changing them costs.

A server with a small memory budget is asked for half as many adapters as its device holds, for as
many, and for twice, four and eight times as many, all alike. All of them are in host memory; what
is measured is bringing them to the device and waiting for room there.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ..errors import BenchmarkError
from ..load.popularity import Popularity
from ..load.results import Latencies, latencies
from ..load.run import Outcome, Record
from .findings import Bar, Finding, brief, faults, rate
from .setup import Setup
from .subject import Subject, running

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Live adapters over those that the device holds; the first are all resident."""
LEAST_RATIO = 0.6
MOST_WAIT = 3.0
"""Of the longest wait for a first token over the longest with all resident: more is starving."""
_BAR_LEVEL = 4.0


@dataclass(frozen=True, slots=True)
class Level:
    """All runs with so many live adapters.

    Attributes:
        times: Live adapters over what the device holds.
        live: Adapters.
        runs: One a round.
    """

    times: float
    live: int
    runs: tuple[Outcome, ...]

    @property
    def records(self) -> list[Record]:
        """Of all runs."""
        return [record for run in self.runs for record in run.records]


def measure(setup: Setup, memory_budget: int) -> tuple[Finding, list[Level]]:
    """Fill the device, then let the levels take turns.

    Raises:
        BenchmarkError: There are too few adapters, or the server cannot be had or ended.
    """
    options = setup.options(memory_budget, len(setup.fleet.names) + 1)
    options += ["--max-num-seqs", str(setup.size.streams)]
    setup.say("overcommit: starting")
    with running(setup, "overcommit", setup.state_dir, options) as subject:
        held, levels = asyncio.run(_levels(setup, subject))
    return judge(held, levels), levels


def judge(held: int, levels: Sequence[Level]) -> Finding:
    """Hold figures to their bars."""
    ratios = {level.times: relative(level, levels[0]) for level in levels}
    figures = {
        "device_holds": held,
        "levels": [_told(level, ratios[level.times]) for level in levels],
    }
    longest = _longest_wait(levels)
    bars = (
        Bar(
            f"tokens/s at {_BAR_LEVEL:g}x over all resident", ratios[_BAR_LEVEL], LEAST_RATIO, True
        ),
        Bar("longest wait for a first token over that with all resident", longest, MOST_WAIT),
    )
    wrong = [line for level in levels for line in faults(f"{level.times:g}x", level.records)]
    return Finding(figures, bars, tuple(wrong))


def relative(level: Level, resident: Level) -> float:
    """Tokens/s over those with all adapters resident: the median of the rounds."""
    pairs = zip(level.runs, resident.runs, strict=True)
    return round(median(rate(one) / rate(other) for one, other in pairs), 4)


def _longest_wait(levels: Sequence[Level]) -> float | None:
    """Over all levels, relative to that of the first."""
    longest = [each for each in (_waits(level).max for level in levels) if each is not None]
    return round(max(longest) / longest[0], 2) if len(longest) == len(levels) else None


def _waits(level: Level) -> Latencies:
    return latencies([record.ttft for record in level.records if record.error is None])


def _told(level: Level, ratio: float) -> Mapping[str, object]:
    waits = _waits(level)
    return {
        "times": level.times,
        "live": level.live,
        "ratio": ratio,
        "wait_p50_ms": waits.p50,
        "wait_p99_ms": waits.p99,
        "wait_max_ms": waits.max,
        "adapters_served": len({r.model for r in level.records if r.error is None}),
        "rounds": [brief(run) for run in level.runs],
    }


async def _levels(setup: Setup, subject: Subject) -> tuple[int, list[Level]]:
    held = await _held(setup, subject)
    live = {times: max(1, round(times * held)) for times in LEVELS}
    if max(live.values()) > len(setup.fleet.names):
        raise BenchmarkError(
            f"--adapters {len(setup.fleet.names)}: the device holds {held}, and {LEVELS[-1]:g}"
            " times as many are needed: ask for more, or for a smaller --device-budget"
        )
    await _touch(setup, subject, max(live.values()))
    runs: dict[float, list[Outcome]] = {times: [] for times in LEVELS}
    for number in range(1, setup.size.rounds + 1):
        for times in LEVELS if number % 2 else LEVELS[::-1]:
            setup.say(f"overcommit: round {number} of {setup.size.rounds}, {times:g}x")
            names = setup.fleet.names[: live[times]]
            await _touch(setup, subject, min(live[times], held))
            phase = f"overcommit/{number}/{times}"
            load = setup.size.workload(names, Popularity("uniform"), phase)
            runs[times].append(await subject.run(load))
    return held, [Level(times, live[times], tuple(runs[times])) for times in LEVELS]


async def _held(setup: Setup, subject: Subject) -> int:
    """Adapters on the device once no more come in: ask for more and more of them."""
    held = 0
    for asked in range(setup.size.streams, len(setup.fleet.names) + 1, setup.size.streams):
        await _touch(setup, subject, asked, asked - setup.size.streams)
        before, held = held, len(subject.loaded()["gpu"])
        if held <= before:
            break
    return held


async def _touch(setup: Setup, subject: Subject, to: int, start: int = 0) -> None:
    """Ask for each of these adapters once, for one token."""
    names, size = setup.fleet.names[start:to], replace(setup.size, output_tokens=1)
    await subject.run(size.workload(names, Popularity("turns"), f"touch/{to}", len(names)))
