"""Sends a workload's requests and keeps what came of each. One event loop does it all."""

import asyncio
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import numpy as np
from numpy.typing import NDArray

from ..client import Answer, RequestFailed, open_client
from .arrivals import Closed
from .progress import Progress, Tally
from .workload import Planned, Workload

_WARMUP_STREAMS = 16
"""Of an open loop's warm-up."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request; all times in seconds since the run started.

    Attributes:
        model: It was for.
        tenant: Whose it was.
        due: When it should have been sent; None in a closed loop.
        sent: When it was.
        ended: When its answer was complete, or failed.
        times: (arrivals,) when chunks with tokens arrived.
        tokens: (arrivals,) how many tokens each brought.
        prompt_tokens: By the server, else as sent; None where neither is known.
        error: Why it failed; None if it did not.
    """

    model: str
    tenant: str | None
    due: float | None
    sent: float
    ended: float
    times: NDArray[np.float64]
    tokens: NDArray[np.int64]
    prompt_tokens: int | None
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return float(self.times[0]) - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return float(self.times[-1]) - self.sent

    @property
    def output_tokens(self) -> int:
        """How many arrived."""
        return int(self.tokens.sum())

    @property
    def tpot(self) -> float:
        """Seconds per token after the first arrival; 0 if there is none."""
        later = int(self.tokens[1:].sum())
        return float(self.times[-1] - self.times[0]) / later if later else 0.0

    def gaps(self) -> NDArray[np.float64]:
        """(tokens after the first arrival,) seconds per token: a gap is shared by its chunk's."""
        later = self.tokens[1:]
        shared: NDArray[np.float64] = np.repeat(np.diff(self.times) / later, later)
        return shared


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run.

    Attributes:
        records: Of all requests; not shown, as asyncio prepares to show the result of a run.
        seconds: From its start to the end of its last request.
        cpu_seconds: Of this process in that time.
        warmup_errors: Why requests of the warm-up failed.
    """

    records: list[Record] = field(repr=False)
    seconds: float
    cpu_seconds: float
    warmup_errors: list[str]


async def run(base_url: str, workload: Workload, silence: float, *, reuse: bool = True) -> Outcome:
    """Warm up, then measure; ``reuse`` connections for further requests."""
    _allow_many_connections()
    async with open_client(base_url, silence, reuse=reuse) as client:
        warmup = _Sender(client, Tally("warm-up", workload.warmup, None))
        load = workload.load
        streams = load.concurrency if isinstance(load, Closed) else _WARMUP_STREAMS
        if workload.warmup:
            async with Progress(warmup.tally):
                await warmup.closed(workload.warm_up(), streams, None)
        measure = _Sender(client, Tally("measure", workload.requests, workload.seconds))
        cpu = time.process_time()
        async with Progress(measure.tally):
            await measure.send(workload)
        return Outcome(
            records=measure.records,
            seconds=measure.now(),
            cpu_seconds=time.process_time() - cpu,
            warmup_errors=[record.error for record in warmup.records if record.error],
        )


def _allow_many_connections() -> None:
    """An open loop may need one for each request: take as many files as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Sender:
    """One phase of a run."""

    def __init__(self, client: httpx.AsyncClient, tally: Tally) -> None:
        self.tally = tally
        self.records: list[Record] = []
        self._client = client
        self._started = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    async def send(self, workload: Workload) -> None:
        if isinstance(workload.load, Closed):
            await self.closed(workload.planned(), workload.load.concurrency, workload.seconds)
        else:
            await self.open(workload.planned(), workload.seconds)

    async def closed(self, planned: Iterator[Planned], streams: int, seconds: float | None) -> None:
        """Keep so many requests in flight until there are no more, or the time is up."""

        async def stream() -> None:
            while seconds is None or self.now() < seconds:
                if (each := next(planned, None)) is None:
                    return
                await self._ask(each)

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream())

    async def open(self, planned: Iterator[Planned], seconds: float | None) -> None:
        """Send each when it is due, whatever became of those before."""
        async with asyncio.TaskGroup() as group:
            for each in planned:
                due = each.due or 0.0
                if seconds is not None and due >= seconds:
                    return
                await asyncio.sleep(max(0.0, due - self.now()))
                group.create_task(self._ask(each))

    async def _ask(self, planned: Planned) -> None:
        answer, error = Answer(planned.request), None
        sent = time.perf_counter()
        self.tally.sent += 1
        try:
            await self._read(answer, sent)
        except RequestFailed as failure:
            error = str(failure)
        except httpx.HTTPError as failure:
            error = f"{type(failure).__name__}: {failure}".rstrip(": ")
        self.tally.done += 1
        self.tally.failed += error is not None
        self.records.append(self._record(planned, answer, sent, error))

    async def _read(self, answer: Answer, sent: float) -> None:
        tally, first = self.tally, True
        async for tokens in answer.arrivals(self._client):
            tally.tokens += tokens
            if first:
                tally.add_ttft(answer.times[0] - sent)
                first = False

    def _record(self, planned: Planned, answer: Answer, sent: float, error: str | None) -> Record:
        return Record(
            model=planned.request.model,
            tenant=planned.tenant,
            due=planned.due,
            sent=sent - self._started,
            ended=self.now(),
            times=np.array(answer.times) - self._started,
            tokens=np.array(answer.tokens, dtype=np.int64),
            prompt_tokens=(
                planned.prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens
            ),
            error=error,
        )
