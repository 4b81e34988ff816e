"""The HTTP process's side of the engine: starts it, talks to it, starts it again when it dies.

For every request in flight the client keeps the request and the tokens received. Since token i of a
sequence is drawn from (seed, i) alone, that is all another engine would need to go on.
"""

import asyncio
import logging
import multiprocessing
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

import msgspec
import zmq
import zmq.asyncio

from ...adapters import errors as adapter_errors
from ...adapters.errors import AdapterError
from ..generation import GenerationRequest, SequenceUpdate
from .config import EngineConfig
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
    LoadAdapter,
    Shutdown,
    StepOutputs,
    Submit,
    UnloadAdapter,
)
from .process import run_engine

logger = logging.getLogger(__name__)

_RESTART_DELAYS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before each restart in a row; the last one repeats."""

_SHUTDOWN_SECONDS = 10.0


@dataclass(slots=True)
class _Live:
    """A request in flight: what was asked for, what has come, and where updates go."""

    request: GenerationRequest
    token_ids: list[int] = field(default_factory=list)
    updates: asyncio.Queue[SequenceUpdate | EngineDied] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True, slots=True)
class _Registered:
    path: str
    digest: str


class EngineClient:
    """An engine process that is kept alive.

    Args:
        config: What the engine runs.
        max_waiting: Requests beyond ``config.max_num_seqs`` that may be in flight.
        on_stats: Called with every report of the engine.
    """

    def __init__(
        self, config: EngineConfig, max_waiting: int, on_stats: Callable[[EngineStats], None]
    ) -> None:
        """Prepare, within a running event loop; ``start`` starts the process."""
        self._config = config
        self._max_in_flight = config.max_num_seqs + max_waiting
        self._on_stats = on_stats
        self._live: dict[str, _Live] = {}
        self._registered: dict[int, _Registered] = {}
        self._loads: dict[int, asyncio.Future[AdapterInfo]] = {}
        self._unloads: dict[int, asyncio.Future[None]] = {}
        self._connection: _Connection | None = None
        self._process: BaseProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._failure: str | None = None
        self._first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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

    def start(self) -> None:
        """Start the engine and keep one running; ``ready`` tells when requests are served."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

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
            if not ended and self._connection is not None:
                self._connection.try_send(Abort([request.request_id]))

    async def load_adapter(self, adapter_id: int, path: str, digest: str | None) -> AdapterInfo:
        """Load an adapter and keep it registered, also with engines started later.

        Raises:
            AdapterError: The adapter is refused.
            EngineUnavailable: The engine is not running now.
            EngineDied: The engine ended while it loaded the adapter.
        """
        loaded: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        self._send(LoadAdapter(adapter_id, path, digest))
        self._loads[adapter_id] = loaded
        try:
            info = await loaded
        finally:
            del self._loads[adapter_id]
        self._registered[adapter_id] = _Registered(path, info.digest)
        return info

    async def unload_adapter(self, adapter_id: int) -> None:
        """Forget an adapter; returns once its last request has ended and nothing of it is left."""
        self._registered.pop(adapter_id, None)
        if self._connection is None or self._info is None:
            return
        unloaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unloads[adapter_id] = unloaded
        try:
            self._send(UnloadAdapter(adapter_id))
            await unloaded
        finally:
            del self._unloads[adapter_id]

    def _admit(self, request: GenerationRequest) -> _Live:
        if len(self._live) >= self._max_in_flight:
            raise QueueFull(f"{len(self._live)} requests are in flight, as many as may be")
        self._send(Submit(request))
        live = self._live[request.request_id] = _Live(request)
        return live

    def _send(self, command: Command) -> None:
        if self._connection is None or self._info is None or not self._connection.try_send(command):
            raise EngineUnavailable("the engine is starting or restarting; try again shortly")

    async def _supervise(self) -> None:
        """Run one engine after another; only the first must reach readiness."""
        failures = 0
        while True:
            was_ready = await self._run_one_engine()
            reason = self._failure or "the engine process ended unexpectedly"
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
        with _open_connection() as connection, _running(self._config, connection) as process:
            self._connection, self._process = connection, process
            pump = asyncio.create_task(self._pump(connection), name="engine-events")
            try:
                await _wait_for_end(process)
                await connection.drain()
            finally:
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)
                was_ready = self._info is not None
                self._connection = self._process = self._info = self._stats = None
                self._fail_everything(self._failure or "the engine process ended unexpectedly")
        return was_ready

    async def _pump(self, connection: "_Connection") -> None:
        while True:
            self._dispatch(await connection.receive())

    def _dispatch(self, event: Event) -> None:
        match event:
            case StepOutputs():
                self._stats = event.stats
                self._on_stats(event.stats)
                self._deliver(event.updates)
            case AdapterLoaded():
                self._settle_load(event.adapter_id, event.info)
            case AdapterRefused():
                error: type[AdapterError] = getattr(adapter_errors, event.error)
                self._settle_load(event.adapter_id, error(event.message))
            case AdapterUnloaded():
                if (unload := self._unloads.get(event.adapter_id)) is not None:
                    unload.set_result(None)
            case EngineInfo():
                self._info = event
                self._register_again()
                if not self._first_ready.done():
                    self._first_ready.set_result(None)
            case EngineFailed():
                self._failure = event.message

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            live = self._live.get(update.request_id)
            if live is not None:
                live.token_ids.extend(update.token_ids)
                live.updates.put_nowait(update)

    def _settle_load(self, adapter_id: int, outcome: AdapterInfo | AdapterError) -> None:
        load = self._loads.get(adapter_id)
        if load is None or load.done():
            if isinstance(outcome, AdapterError):
                logger.error("adapter %d is gone after the restart: %s", adapter_id, outcome)
        elif isinstance(outcome, AdapterError):
            load.set_exception(outcome)
        else:
            load.set_result(outcome)

    def _register_again(self) -> None:
        """Tell a restarted engine of every adapter that the last one had."""
        for adapter_id, adapter in self._registered.items():
            self._send(LoadAdapter(adapter_id, adapter.path, adapter.digest))

    def _fail_everything(self, reason: str) -> None:
        for live in self._live.values():
            live.updates.put_nowait(EngineDied(reason))
        for load in self._loads.values():
            if not load.done():
                load.set_exception(EngineDied(reason))
        for unload in self._unloads.values():
            if not unload.done():
                unload.set_result(None)


class _Connection:
    """The sockets to one engine process; a new process gets new ones, so nothing stale arrives."""

    def __init__(self, context: zmq.asyncio.Context, folder: str) -> None:
        self.command_url = f"ipc://{folder}/commands"
        self.event_url = f"ipc://{folder}/events"
        # A plain socket: a command is sent at once or not at all, and never awaited.
        self._commands = zmq.Context(context).socket(zmq.PUSH)
        self._events = context.socket(zmq.PULL)
        for socket in (self._commands, self._events):
            socket.setsockopt(zmq.LINGER, 0)
            socket.set_hwm(0)
        self._commands.bind(self.command_url)
        self._events.bind(self.event_url)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)

    def try_send(self, command: Command) -> bool:
        """Send a command; False where no engine is there to take it."""
        try:
            self._commands.send(self._encoder.encode(command), zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    async def receive(self) -> Event:
        """The next event."""
        event: Event = self._decoder.decode(await self._events.recv())
        return event

    async def drain(self) -> None:
        """Let what an ended engine has still said be received."""
        while await self._events.poll(50):
            await asyncio.sleep(0)

    def close(self) -> None:
        """Close both sockets."""
        self._commands.close()
        self._events.close()


@contextmanager
def _open_connection() -> Iterator[_Connection]:
    with (
        tempfile.TemporaryDirectory(prefix="deltamux-") as folder,
        zmq.asyncio.Context() as context,
    ):
        connection = _Connection(context, folder)
        try:
            yield connection
        finally:
            connection.close()


@contextmanager
def _running(config: EngineConfig, connection: _Connection) -> Iterator[BaseProcess]:
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
        process.join(_SHUTDOWN_SECONDS if process.is_alive() else None)
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
