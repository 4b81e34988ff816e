"""Cold adapters beside steady traffic: what the steady traffic feels of loading them.

Three kinds of runs take turns on one server. *Quiet*: streams over as many warm adapters. *Busy*:
beside them further requests at the rate of the storm, but for warm adapters. *Storm*: those are for
adapters that are on disk only. Host memory holds the warm ones and few others, and those few have
been pushed out again before their turn comes back.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median

import httpx
import numpy as np

from ..client import Answer, Request, RequestFailed, open_client, random_prompt
from ..errors import BenchmarkError
from ..load.popularity import Popularity
from ..load.results import latencies
from ..load.run import Outcome
from .findings import Bar, Finding, brief, faults
from .setup import Setup
from .subject import Subject, running

MOST_SLOWDOWN = 1.2
KINDS = ("quiet", "busy", "storm")
_SPARE = 32
"""Adapters that host memory has room for beside the warm ones."""
_PROMPT_TOKENS, _OUTPUT_TOKENS = 16, 4
"""Of a further request: it should cost little but its adapter."""
_MEMORY_BUDGET = 1 << 30


@dataclass(slots=True)
class Extra:
    """What came of the further requests: seconds to first tokens, and why some failed."""

    sent: int = 0
    waits: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Turn:
    """One run."""

    warm: Outcome
    extra: Extra


def measure(setup: Setup, per_minute: float) -> Finding:
    """Let the three kinds of runs take turns.

    Raises:
        BenchmarkError: There are too few adapters, or the server cannot be had or ended.
    """
    names, streams = setup.fleet.names, setup.size.streams
    least = streams + 3 * _SPARE
    if len(names) < least:
        raise BenchmarkError(f"--adapters {len(names)}: storm needs {least} at --streams {streams}")
    options = setup.options(_MEMORY_BUDGET, streams + _SPARE)
    setup.say("storm: starting")
    with running(setup, "storm", setup.state_dir, options) as subject:
        return judge(asyncio.run(_rounds(setup, subject, per_minute)))


def judge(rounds: Sequence[Mapping[str, Turn]]) -> Finding:
    """Hold figures to their bars."""
    slower = {
        kind: [round(_itl(each[kind].warm) / _itl(each["quiet"].warm), 4) for each in rounds]
        for kind in KINDS[1:]
    }
    figures: dict[str, object] = {f"{kind}_over_quiet": each for kind, each in slower.items()}
    figures["rounds"] = [{kind: _told(turn) for kind, turn in each.items()} for each in rounds]
    value = round(median(slower["storm"]), 4)
    bar = Bar("p99 between warm tokens, storm over quiet", value, MOST_SLOWDOWN)
    turns = [turn for each in rounds for turn in each.values()]
    wrong = [line for turn in turns for line in faults("storm, warm", turn.warm.records)]
    wrong += [f"storm, cold: {error}" for turn in turns for error in turn.extra.errors[:1]]
    return Finding(figures, (bar,), tuple(wrong))


def _itl(outcome: Outcome) -> float:
    """The 99th percentile of the seconds between tokens."""
    gaps = [record.gaps() for record in outcome.records if record.error is None]
    return float(np.percentile(np.concatenate(gaps), 99, method="inverted_cdf"))


def _told(turn: Turn) -> dict[str, object]:
    waits = latencies(turn.extra.waits)
    extra = {"sent": turn.extra.sent, "failed": len(turn.extra.errors)}
    return {
        **brief(turn.warm),
        "extra": extra | {"ttft_p50_ms": waits.p50, "ttft_p99_ms": waits.p99},
    }


async def _rounds(setup: Setup, subject: Subject, per_minute: float) -> list[dict[str, Turn]]:
    names, size = setup.fleet.names, setup.size
    warm, cold = names[: size.streams], names[size.streams :]
    extras = {"quiet": iter(()), "busy": cycle(warm), "storm": cycle(cold)}
    await subject.run(size.workload(warm, Popularity("turns"), "storm/warm-up", 2 * size.streams))
    rounds = []
    for number in range(1, size.rounds + 1):
        setup.say(f"storm: round {number} of {size.rounds}")
        kinds = KINDS if number % 2 else KINDS[::-1]
        rounds.append(
            {
                kind: await _turn(setup, subject, f"{number}/{kind}", extras[kind], per_minute)
                for kind in kinds
            }
        )
    return rounds


async def _turn(
    setup: Setup, subject: Subject, phase: str, models: Iterator[str], per_minute: float
) -> Turn:
    """A run over the warm adapters, with further requests for ``models`` as long as it goes on."""
    size, extra, over = setup.size, Extra(), asyncio.Event()
    steady = size.workload(setup.fleet.names[: size.streams], Popularity("turns"), f"storm/{phase}")
    asked = (
        Request(
            model,
            random_prompt(f"{size.seed}/{phase}/{number}", _PROMPT_TOKENS, size.token_ids),
            _OUTPUT_TOKENS,
        )
        for number, model in enumerate(models)
    )
    async with open_client(subject.url) as client:
        sender = asyncio.create_task(_send(client, asked, 60 / per_minute, extra, over))
        try:
            warm = await subject.run(steady)
        finally:
            over.set()
            await sender
    return Turn(warm, extra)


async def _send(
    client: httpx.AsyncClient,
    requests: Iterator[Request],
    every: float,
    extra: Extra,
    over: asyncio.Event,
) -> None:
    """Send them at even times, whatever becomes of those before, until it is over."""
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(requests, start=1):
            await asyncio.sleep(started + number * every - time.perf_counter())
            if over.is_set():
                return
            group.create_task(_ask(client, request, extra))


async def _ask(client: httpx.AsyncClient, request: Request, extra: Extra) -> None:
    answer, sent = Answer(request), time.perf_counter()
    extra.sent += 1
    try:
        async for _ in answer.arrivals(client):
            pass
        extra.waits.append(answer.times[0] - sent)
    except (RequestFailed, httpx.HTTPError) as error:
        extra.errors.append(f"{request.model}: {type(error).__name__}: {error}")
