"""The HTTP process's side of the engine: starts it, talks to it, starts it again when it dies.

For every request in flight the client keeps the request and the tokens received. Since token i of a
sequence is drawn from (seed, i) alone, that is all another engine would need to go on.
"""

import asyncio
import logging
import multiprocessing
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

import zmq

from ...adapters import errors as adapter_errors
from ...adapters.errors import AdapterError
from ..generation import GenerationRequest, SequenceUpdate, Share
from ..scheduler.shares import ActiveShares
from ..text.tokenizer_source import TokenizerSource
from .config import EngineConfig
from .connection import Connection, open_connection
from .errors import EngineDied, EngineStartFailed, EngineUnavailable, QueueFull
from .messages import (
    Abort,
    AdapterInfo,
    AdapterLoaded,
    AdapterRefused,
    AdapterUnloaded,
    Command,
    EngineFailed,
    EngineInfo,
    EngineStats,
    Event,
    HostChanges,
    LoadAdapter,
    PinAdapter,
    Shutdown,
    StepOutputs,
    Submit,
    TokenizerRead,
    UnloadAdapter,
)
from .process import run_engine

logger = logging.getLogger(__name__)

_RESTART_DELAYS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before each restart in a row; the last one repeats."""

_SHUTDOWN_SECONDS = 10.0

_NO_REASON = "the engine process ended unexpectedly"


@dataclass(slots=True)
class _Live:
    """A request in flight: what was asked for, what has come, and where updates go."""

    request: GenerationRequest
    token_ids: list[int] = field(default_factory=list)
    updates: asyncio.Queue[SequenceUpdate | EngineDied] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True, slots=True)
class EngineListener:
    """Who is told what the engine does beside answering requests.

    Attributes:
        on_stats: Gets every report.
        on_host_changes: Gets what came to host memory and what left it.
        on_ready: Called for every engine that becomes ready; it knows no adapter yet.
        on_down: Called for every engine that ends.
    """

    on_stats: Callable[[EngineStats], None]
    on_host_changes: Callable[[HostChanges], None]
    on_ready: Callable[[], None]
    on_down: Callable[[], None]


class EngineClient:
    """An engine process that is kept alive.

    Args:
        config: What the engine runs.
        max_waiting: Requests beyond ``config.max_num_seqs`` that may be in flight; of tenants
            that have less than their share of them, more.
    """

    def __init__(self, config: EngineConfig, max_waiting: int) -> None:
        """Prepare, within a running event loop; ``start`` starts the process."""
        self._config = config
        self._max_in_flight = config.max_num_seqs + max_waiting
        self._listener: EngineListener | None = None
        self._live: dict[str, _Live] = {}
        self._shares = ActiveShares()
        self._loads: dict[int, asyncio.Future[AdapterInfo]] = {}
        self._unloads: dict[int, asyncio.Future[None]] = {}
        self._connection: Connection | None = None
        self._process: BaseProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._failure: str | None = None
        loop = asyncio.get_running_loop()
        self._tokenizer: asyncio.Future[TokenizerSource] = loop.create_future()
        self._first_ready: asyncio.Future[None] = loop.create_future()
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None

    @property
    def info(self) -> EngineInfo | None:
        """What the engine runs; None until it is ready and while it is down."""
        return self._info

    @property
    def stats(self) -> EngineStats | None:
        """The engine's latest report."""
        return self._stats

    @property
    def pid(self) -> int | None:
        """Process id of the engine, None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self, listener: EngineListener) -> None:
        """Start the engine and keep one running; ``ready`` tells when requests are served."""
        self._listener = listener
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def tokenizer(self) -> TokenizerSource:
        """Wait until the first engine has read the base's tokenizer.

        Raises:
            EngineStartFailed: It ended before it had.
        """
        told: tuple[asyncio.Future[TokenizerSource], asyncio.Future[None]]
        told = self._tokenizer, self._first_ready
        await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
        if not self._tokenizer.done():
            self._first_ready.result()
        return self._tokenizer.result()

    async def ready(self) -> None:
        """Wait until the first engine is ready.

        Raises:
            EngineStartFailed: It ended before it was.
        """
        await self._first_ready

    async def stop(self) -> None:
        """End the engine; requests in flight end with EngineDied."""
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        self._first_ready.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_everything("the server is shutting down")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceUpdate, None]:
        """Updates of one sequence until its last; leaving the iterator early aborts the sequence.

        Raises:
            QueueFull: As many requests as may wait are waiting.
            EngineUnavailable: The engine is not running now.
            EngineDied: The engine ended while the sequence ran.
        """
        live = self._admit(request)
        ended = False
        try:
            while not ended:
                update = await live.updates.get()
                if isinstance(update, EngineDied):
                    ended = True
                    raise update
                ended = update.finish_reason is not None
                yield update
        finally:
            del self._live[request.request_id]
            self._shares.leave(request.share.tenant)
            if not ended:
                self._try_send(Abort([request.request_id]))

    async def load_adapter(self, adapter_id: int, path: str, digest: str | None) -> AdapterInfo:
        """Load an adapter and keep it registered with the engine that runs now.

        Raises:
            AdapterError: The adapter is refused.
            EngineUnavailable: The engine is not running now.
            EngineDied: The engine ended while it loaded the adapter.
        """
        loaded: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        self._send(LoadAdapter(adapter_id, path, digest))
        self._loads[adapter_id] = loaded
        try:
            return await loaded
        except asyncio.CancelledError:
            self._try_send(UnloadAdapter(adapter_id))
            raise
        finally:
            del self._loads[adapter_id]

    async def unload_adapter(self, adapter_id: int) -> None:
        """Forget an adapter; returns once its last request has ended and nothing of it is left."""
        if self._connection is None or self._info is None:
            return
        unloaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unloads[adapter_id] = unloaded
        try:
            self._send(UnloadAdapter(adapter_id))
            await unloaded
        finally:
            del self._unloads[adapter_id]

    def pin_adapter(self, adapter_id: int, pinned: bool) -> None:
        """Keep a loaded adapter in memory while no request uses it, or stop to."""
        self._try_send(PinAdapter(adapter_id, pinned))

    def _admit(self, request: GenerationRequest) -> _Live:
        if not self._has_room(request.share):
            raise QueueFull(f"{len(self._live)} requests are in flight, as many as may be")
        self._send(Submit(request))
        live = self._live[request.request_id] = _Live(request)
        self._shares.join(request.share)
        return live

    def _has_room(self, share: Share) -> bool:
        """Whether one more may be in flight; where others fill the queue, up to its share of it."""
        if len(self._live) < self._max_in_flight:
            return True
        own = self._shares.number(share.tenant)
        return own < self._shares.with_one_more(share) * self._max_in_flight

    def _try_send(self, command: Command) -> bool:
        return self._connection is not None and self._connection.try_send(command)

    def _send(self, command: Command) -> None:
        if self._info is None or not self._try_send(command):
            raise EngineUnavailable("the engine is starting or restarting; try again shortly")

    async def _supervise(self) -> None:
        """Run one engine after another; only the first must reach readiness."""
        failures = 0
        while True:
            try:
                was_ready = await self._run_one_engine()
            except (OSError, zmq.ZMQError) as error:
                self._failure, was_ready = f"no engine process can be started: {error}", False
            reason = self._failure or _NO_REASON
            if not self._first_ready.done():
                self._first_ready.set_exception(EngineStartFailed(reason))
                return
            failures = 0 if was_ready else failures + 1
            delay = _RESTART_DELAYS[min(failures, len(_RESTART_DELAYS) - 1)]
            logger.error("engine down (%s); starting another in %.1f s", reason, delay)
            await asyncio.sleep(delay)

    async def _run_one_engine(self) -> bool:
        """Start an engine and follow it until it ends; whether it was ready in between."""
        self._failure = None
        with open_connection() as connection:
            async with _running(self._config, connection) as process:
                self._connection, self._process = connection, process
                try:
                    await self._follow(connection, process)
                finally:
                    was_ready = self._info is not None
                    self._connection = self._process = self._info = self._stats = None
                    self._tell(lambda listener: listener.on_down())
                    self._fail_everything(self._failure or _NO_REASON)
        return was_ready

    async def _follow(self, connection: Connection, process: BaseProcess) -> None:
        """Take in events until the engine ends, or until taking one in fails: no engine then."""
        pump = asyncio.create_task(self._pump(connection), name="engine-events")
        ended = asyncio.create_task(_wait_for_end(process), name="engine-end")
        try:
            await asyncio.wait({pump, ended}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                logger.error("events of the engine cannot be taken in", exc_info=pump.exception())
                self._failure = f"its events cannot be taken in: {pump.exception()!r}"
                process.kill()
        finally:
            pump.cancel()
            ended.cancel()
            await asyncio.gather(pump, ended, return_exceptions=True)
        async for event in connection.remaining():
            self._dispatch(event)

    async def _pump(self, connection: Connection) -> None:
        while True:
            self._dispatch(await connection.receive())

    def _dispatch(self, event: Event) -> None:
        match event:
            case StepOutputs():
                self._stats = event.stats
                self._tell(lambda listener: listener.on_stats(event.stats))
                self._deliver(event.updates)
            case AdapterLoaded():
                self._settle_load(event.adapter_id, event.info)
            case AdapterRefused():
                error: type[AdapterError] = getattr(adapter_errors, event.error)
                self._settle_load(event.adapter_id, error(event.message))
            case AdapterUnloaded():
                unload = self._unloads.get(event.adapter_id)
                if unload is not None and not unload.done():
                    unload.set_result(None)
            case HostChanges():
                self._tell(lambda listener: listener.on_host_changes(event))
            case TokenizerRead():
                if not self._tokenizer.done():
                    self._tokenizer.set_result(event.source)
            case EngineInfo():
                self._info = event
                self._tell(lambda listener: listener.on_ready())
                if not self._first_ready.done():
                    self._first_ready.set_result(None)
            case EngineFailed():
                self._failure = event.message
                if self._process is not None:
                    self._process.kill()

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            live = self._live.get(update.request_id)
            if live is not None:
                live.token_ids.extend(update.token_ids)
                live.updates.put_nowait(update)

    def _settle_load(self, adapter_id: int, outcome: AdapterInfo | AdapterError) -> None:
        load = self._loads.get(adapter_id)
        if load is None or load.done():
            return
        if isinstance(outcome, AdapterError):
            load.set_exception(outcome)
        else:
            load.set_result(outcome)

    def _tell(self, what: Callable[[EngineListener], None]) -> None:
        if self._listener is not None:
            what(self._listener)

    def _fail_everything(self, reason: str) -> None:
        for live in self._live.values():
            live.updates.put_nowait(EngineDied(reason))
        for load in self._loads.values():
            if not load.done():
                load.set_exception(EngineDied(reason))
        for unload in self._unloads.values():
            if not unload.done():
                unload.set_result(None)


@asynccontextmanager
async def _running(config: EngineConfig, connection: Connection) -> AsyncIterator[BaseProcess]:
    """An engine process that is gone when the block is left."""
    process = multiprocessing.get_context("spawn").Process(
        target=run_engine,
        args=(config, connection.command_url, connection.event_url),
        name="deltamux-engine",
    )
    process.start()
    try:
        yield process
    finally:
        connection.try_send(Shutdown())
        await asyncio.to_thread(process.join, _SHUTDOWN_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


async def _wait_for_end(process: BaseProcess) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
