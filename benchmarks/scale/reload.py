"""New versions of one name under load: whose answers come, whether memory stays flat, what is left.

There are a few adapters whose greedy answers are known beforehand. One name stands for each of them
in turn, a thousand times, every time with other bytes, while streams ask it the same prompts again
and again, so that the prefix cache has them. In float32, where a neighbour's rows change no answer.
"""

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import track

from ..client import Answer, Request, RequestFailed, open_client, random_prompt
from ..errors import BenchmarkError
from ..swap_soak import slope, write_version
from .findings import Bar, Finding
from .fleet import Fleet, make_fleet
from .setup import Option, Setup
from .subject import Resident, Subject, running

VERSIONS, _RANK, _STRENGTH = 4, 8, 0.1
"""Adapters that the name stands for in turn, and what makes them say different things."""
NAME = "reloaded"
MOST_GROWTH = 0.02
"""Of resident memory, over a thousand reloads."""
_PROMPTS, _PROMPT_TOKENS, _OUTPUT_TOKENS = 4, 40, 12
_MEMORY_BUDGET, _HOST_BUDGET = 64 << 20, 64 << 20
_UNLOAD_SECONDS = 20.0

Prompt = tuple[int, ...]
Tokens = tuple[int, ...]
Known = Mapping[tuple[int, Prompt], Tokens]
"""Answers by version and prompt."""


@dataclass(slots=True)
class Progress:
    """How far the reloads are, by which answers are judged.

    Attributes:
        posted: The newest version that was asked for.
        acknowledged: The newest version that the server said it serves.
    """

    posted: int = -1
    acknowledged: int = -1


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    answers: int = 0
    cached_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    resident: list[Resident] = field(default_factory=list)


def measure(setup: Setup, reloads: int) -> Finding:
    """Reload under load, then unload.

    Raises:
        BenchmarkError: The versions cannot be told apart, or the server cannot be had or ended.
    """
    versions = make_versions(setup)
    state_dir = setup.work_dir / "reload-state"
    shutil.rmtree(state_dir, ignore_errors=True)
    options: list[Option] = ["--adapter-dir", versions.folder, "--dtype", "float32"]
    options += ["--memory-budget", str(_MEMORY_BUDGET), "--host-memory-budget", str(_HOST_BUDGET)]
    setup.say("reload: starting")
    with running(setup, "reload", state_dir, options) as subject:
        return asyncio.run(_Run(setup, subject, versions).all(reloads))


def make_versions(setup: Setup) -> Fleet:
    """The adapters that the name stands for in turn."""
    return make_fleet(
        setup.base,
        setup.work_dir,
        VERSIONS,
        _RANK,
        setup.size.seed,
        b_std=_STRENGTH,
        name="version",
    )


def judge(tally: Tally, before: Mapping[str, int], after: Mapping[str, int]) -> Finding:
    """Hold figures to their bars."""
    growth = {
        name: growth_per_thousand([asdict(each)[name] for each in tally.resident])
        for name in ("http", "engine")
    }
    figures: dict[str, object] = {
        "reloads": len(tally.resident) - 1,
        "answers": tally.answers,
        "cached_prompt_tokens": tally.cached_tokens,
        "resident_first": asdict(tally.resident[0]),
        "resident_middle": asdict(tally.resident[len(tally.resident) // 2]),
        "resident_last": asdict(tally.resident[-1]),
        "growth_per_1000": growth,
        "held_before": dict(before),
        "held_after": dict(after),
    }
    bars = (
        Bar("requests that failed", len(tally.errors), 0),
        Bar("answers of no version that was served", len(tally.wrong), 0),
        *(
            Bar(f"growth of {name} memory over 1000 reloads", value, MOST_GROWTH)
            for name, value in growth.items()
        ),
        Bar("what is left after the unload", left(before, after), 0),
    )
    return Finding(figures, bars, (*tally.errors[:3], *tally.wrong[:3]))


def growth_per_thousand(values: Sequence[int]) -> float:
    """Of the second half, by least squares, over its mean."""
    half = values[len(values) // 2 :]
    return round(1000 * slope(half) * len(half) / sum(half), 4)


def left(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Bytes and adapters that were not there before, over all tiers."""
    return sum(max(0, after[name] - before[name]) for name in before)


class _Run:
    """A run under way."""

    def __init__(self, setup: Setup, subject: Subject, versions: Fleet) -> None:
        self._setup = setup
        self._subject = subject
        self._versions = versions
        self._progress = Progress()
        self._tally = Tally()
        self._over = asyncio.Event()

    async def all(self, reloads: int) -> Finding:
        async with open_client(self._subject.url) as client:
            known = await self._known(client)
            before = self._held()
            await self._under_load(client, known, reloads)
            await _call(client, "DELETE", f"/v1/adapters/{NAME}")
            self._tally.cached_tokens = self._subject.cached_tokens()
            after = await self._held_at_last(before)
        return judge(self._tally, before, after)

    async def _known(self, client: httpx.AsyncClient) -> Known:
        """The answers of each version to prompts to which all answer differently."""
        known: dict[tuple[int, Prompt], Tokens] = {}
        found = 0
        for number in range(8 * _PROMPTS):
            seed = f"{self._setup.size.seed}/reload/{number}"
            prompt = tuple(random_prompt(seed, _PROMPT_TOKENS, self._setup.size.token_ids))
            answers = [(await _ask(client, name, prompt))[0] for name in self._versions.names]
            if len(set(answers)) == VERSIONS:
                known |= {(version, prompt): each for version, each in enumerate(answers)}
                found += 1
            if found == _PROMPTS:
                return known
        raise BenchmarkError("reload: the versions answer too much alike to be told apart")

    async def _under_load(self, client: httpx.AsyncClient, known: Known, reloads: int) -> None:
        source = self._setup.work_dir / "reload-source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        await self._reload(client, source, 0)
        self._tally.resident.append(self._subject.resident())
        streams = [
            asyncio.create_task(self._stream(client, known, index))
            for index in range(self._setup.size.streams)
        ]
        try:
            numbers = range(1, reloads + 1)
            for number in track(numbers, "reloading", console=Console(stderr=True)):
                await self._reload(client, source, number)
                self._tally.resident.append(self._subject.resident())
        finally:
            self._over.set()
            await asyncio.gather(*streams)

    async def _reload(self, client: httpx.AsyncClient, source: Path, number: int) -> None:
        version = self._versions.names[number % VERSIONS]
        write_version(self._versions.path(version), source, number)
        self._progress.posted = number
        body = {"name": NAME, "source": str(source), "replace": True}
        await _call(client, "POST", "/v1/adapters", body)
        self._progress.acknowledged = number

    async def _stream(self, client: httpx.AsyncClient, known: Known, index: int) -> None:
        """Ask the prompts in turn, of the name and now and then of a version under its own."""
        prompts = list(dict.fromkeys(prompt for _, prompt in known))
        for number in count(index):
            if self._over.is_set():
                return
            turn, prompt = number // 4, prompts[(number + number // 4) % len(prompts)]
            version = turn % VERSIONS if number % 4 == 0 else None
            try:
                await self._check(client, known, prompt, version)
            except (RequestFailed, httpx.HTTPError) as error:
                self._tally.errors.append(f"{type(error).__name__}: {error}")

    async def _check(
        self, client: httpx.AsyncClient, known: Known, prompt: Prompt, version: int | None
    ) -> None:
        """Ask a version under its own name, or the name that is reloaded, and judge the answer."""
        oldest = self._progress.acknowledged
        model = NAME if version is None else self._versions.names[version]
        answer, newest = await _ask(client, model, prompt, self._progress)
        self._tally.answers += 1
        served = range(oldest, newest + 1) if version is None else (version,)
        if answer not in {known[each % VERSIONS, prompt] for each in served}:
            of = [each for each in range(VERSIONS) if known[each, prompt] == answer]
            self._tally.wrong.append(
                f"{model}, between reloads {oldest} and {newest}: an answer of"
                f" {f'version {of[0]}' if of else 'none of the versions'}"
            )

    def _held(self) -> dict[str, int]:
        """Adapters and their bytes in each tier."""
        sizes = self._subject.host_bytes()
        held = {
            f"{level}_adapters": each for level, each in self._subject.resident_adapters().items()
        }
        for level, names in self._subject.loaded().items():
            held[f"{level}_bytes"] = sum(sizes[name] for name in names)
        return held | {"disk_bytes": self._subject.store_bytes()}

    async def _held_at_last(self, before: Mapping[str, int]) -> dict[str, int]:
        """What is held once it is what it was, or after a while."""
        deadline = asyncio.get_running_loop().time() + _UNLOAD_SECONDS
        while True:
            after = self._held()
            if not left(before, after) or asyncio.get_running_loop().time() > deadline:
                return after
            await asyncio.sleep(0.2)


async def _ask(
    client: httpx.AsyncClient, model: str, prompt: Prompt, progress: Progress | None = None
) -> tuple[Tokens, int]:
    """The greedy answer, and the newest version that was asked for when its first token came."""
    answer, newest = Answer(Request(model, list(prompt), _OUTPUT_TOKENS)), -1
    async for _ in answer.arrivals(client):
        if newest < 0 and progress is not None:
            newest = progress.posted
    return tuple(answer.token_ids), newest


async def _call(
    client: httpx.AsyncClient, method: str, path: str, body: Mapping[str, object] | None = None
) -> None:
    response = await client.request(method, path, json=body)
    if response.status_code not in (200, 201):
        raise BenchmarkError(f"{method} {path}: HTTP {response.status_code}: {response.text[:300]}")
