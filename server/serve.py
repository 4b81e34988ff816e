"""``deltamux serve``: starts the engine and the HTTP application, and stops them in order."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address
from pathlib import Path

import uvicorn
import uvloop
from sqlalchemy import Engine

from .api.app import create_app
from .api.state import AppState, Limits
from .api.wire import BoundedHttp
from .config import ServeConfig
from .engine.client import EngineClient, EngineListener
from .engine.config import EngineConfig
from .engine.errors import EngineError
from .grammar.check import GrammarCheck
from .grammar.vocabulary import VocabularySource
from .logs import configure
from .metrics.metrics import Metrics
from .model.errors import ModelError
from .model.source import resolve_model
from .state.database import StateError, open_database, write_address
from .store.archives import ArchiveLimits
from .store.arrivals import fetches_ended
from .store.contents import ContentStore
from .store.folders import Declared, DeclaredAdapters, DeclaredRefused
from .store.intake import Intake
from .store.records import Records
from .store.registry import AdapterRegistry
from .store.sources import SourcePolicy
from .tenants.admin import TenantAdmin
from .tenants.directory import TenantDirectory
from .tenants.errors import TenantError
from .tenants.file import TenantsFile
from .tenants.records import TenantRecords
from .text.tokenizer import Tokenizer
from .tools.formats import FORMATS, ToolFormat, format_of
from .tracing import RequestTracer, TracingUnavailable, open_tracer
from .usage.ledger import Ledger
from .usage.records import UsageRecords

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 5
"""How long open streams may go on after the signal to stop."""


_CANNOT_START = (
    ModelError,
    EngineError,
    StateError,
    DeclaredRefused,
    TenantError,
    TracingUnavailable,
    OSError,
)


_SHOWN = 20
"""Adapters that are named when the server is ready."""


class ServeError(Exception):
    """The server cannot start. The message says why and what to do."""


def run(config: ServeConfig) -> None:
    """Serve until a signal ends the process.

    Raises:
        ServeError: The model, an ``--adapter`` or the address cannot be served.
    """
    configure(config.log_format)
    # uvicorn raises the signal again when it has ended; by default that ends the process before
    # the engine is.
    signal.signal(signal.SIGTERM, _exit)
    try:
        listener = _bind(config.host, config.port)
        with (
            _not_waiting_for_fetches(),
            open_tracer(config.otlp_traces_endpoint) as tracer,
            open_database(config.state_dir) as database,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            tenants, file = _tenants(config, database)
            _check_reach(config, listener, tenants.directory)
            write_address(config.state_dir, _url(listener))
            folder = resolve_model(config.model, config.state_dir)
            runner.run(_serve(config, folder, listener, database, tenants, file, tracer))
    except _CANNOT_START as error:
        raise ServeError(str(error)) from error


@contextlib.contextmanager
def _not_waiting_for_fetches() -> Iterator[None]:
    """Let no source that is still being read hold up the process when it is told to end.

    Python would wait for the threads that read. By now all that matters is on disk, and what was
    staged is removed.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if not fetches_ended():
            logger.info("fetches under way are given up")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130 if isinstance(error, KeyboardInterrupt) else int(error.code or 0))
        raise


def _exit(*_: object) -> None:
    raise SystemExit(0)


def _tenants(config: ServeConfig, database: Engine) -> tuple[TenantAdmin, TenantsFile | None]:
    """Who may call, and the file that says so if there is one."""
    directory = TenantDirectory()
    admin = TenantAdmin(TenantRecords(database), directory)
    if config.tenants is None:
        return admin, None
    file = TenantsFile(config.tenants, directory)
    file.load()
    return admin, file


def _check_reach(config: ServeConfig, listener: socket.socket, directory: TenantDirectory) -> None:
    """Refuse to be open to other machines by oversight.

    Raises:
        ServeError: There are no tenants, and other machines can reach the address.
    """
    local = ip_address(listener.getsockname()[0]).is_loopback
    if directory.is_open and not local and not config.allow_open:
        raise ServeError(
            f"without tenants everybody who reaches {config.host} could use the server: name them "
            "with --tenants FILE or `deltamux tenants create`, or say --allow-open"
        )


async def _serve(
    config: ServeConfig,
    folder: Path,
    listener: socket.socket,
    database: Engine,
    tenants: TenantAdmin,
    file: TenantsFile | None,
    tracer: RequestTracer | None,
) -> None:
    metrics = Metrics(config.served_model_name)
    ledger = Ledger(config.state_dir / "usage", UsageRecords(database))
    engine = EngineClient(_engine_config(config, folder), config.max_waiting)
    registry = _registry(config, engine, database)
    declared = DeclaredAdapters(_declared(config), registry)
    async with (
        ledger.running(),
        _running(engine, _listener(metrics, registry)),
        _opened(config, registry),
        _followed(file),
    ):
        tokenizer = await asyncio.to_thread(Tokenizer, await engine.tokenizer())
        check = GrammarCheck(VocabularySource.of(tokenizer.source, tokenizer.vocab_size))
        tools = _tool_format(config.tool_call_parser, tokenizer)
        state = AppState(
            engine,
            tokenizer,
            registry,
            metrics,
            ledger,
            check,
            tools,
            tenants,
            model_root=str(folder),
            limits=Limits(max_upload_bytes=config.max_upload_size),
            policy=SourcePolicy(config.adapter_sources),
            tracer=tracer,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(state, config.cors_origins),
                http=BoundedHttp,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            )
        )
        starting = asyncio.create_task(_start_up(config, engine, state, declared, listener))
        starting.add_done_callback(lambda task: _stop_if_failed(task, server))
        with contextlib.closing(check):
            await server.serve(sockets=[listener])
        if starting.done():
            starting.result()
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)


def _registry(config: ServeConfig, engine: EngineClient, database: Engine) -> AdapterRegistry:
    contents = ContentStore(config.state_dir / "adapters")
    intake = Intake(contents, ArchiveLimits(config.max_adapter_size), config.copy_adapters)
    records = Records(database, config.served_model_name, contents)
    return AdapterRegistry(
        config.served_model_name,
        engine,
        records,
        intake,
        config.adapter_versions,
        config.store_budget,
    )


def _declared(config: ServeConfig) -> Declared:
    return Declared(config.adapters, config.adapter_dirs)


def _listener(metrics: Metrics, registry: AdapterRegistry) -> EngineListener:
    return EngineListener(
        on_stats=metrics.step,
        on_host_changes=registry.residents.host_changed,
        on_ready=registry.residents.engine_ready,
        on_down=registry.residents.engine_down,
    )


@contextlib.asynccontextmanager
async def _opened(config: ServeConfig, registry: AdapterRegistry) -> AsyncIterator[None]:
    """The registry with what was registered before, written back when the block is left."""
    await registry.open(_declared(config).origins)
    writing = asyncio.create_task(registry.write_usage(), name="adapter-usage")
    try:
        yield
    finally:
        writing.cancel()
        await registry.close()


@contextlib.asynccontextmanager
async def _followed(file: TenantsFile | None) -> AsyncIterator[None]:
    """The tenants file read again when it changes, until the block is left."""
    if file is None:
        yield
        return
    following = asyncio.create_task(file.follow(), name="tenants")
    following.add_done_callback(_tell_failure)
    try:
        yield
    finally:
        following.cancel()


def _tell_failure(following: "asyncio.Task[None]") -> None:
    error = None if following.cancelled() else following.exception()
    if error is not None:
        logger.error("the tenants file is not followed any more", exc_info=error)


def _tool_format(name: str, tokenizer: Tokenizer) -> ToolFormat | None:
    return format_of(tokenizer.chat_template) if name == "auto" else FORMATS[name]


async def _start_up(
    config: ServeConfig,
    engine: EngineClient,
    state: AppState,
    declared: DeclaredAdapters,
    listener: socket.socket,
) -> None:
    """Make everything ready, then follow the adapters' folders."""
    await engine.ready()
    # Watched first, so that nothing is missed that changes while they are read.
    watching = asyncio.create_task(declared.watch(), name="adapter-folders")
    try:
        await declared.register()
        # What is there now stays: the collector would look through all of it, between two tokens.
        gc.collect()
        gc.freeze()
        state.started.set()
        _say_ready(config, listener, state)
        await watching
    finally:
        watching.cancel()
        gc.unfreeze()  # what is frozen would count as leaked when the interpreter ends


def _stop_if_failed(starting: "asyncio.Task[None]", server: uvicorn.Server) -> None:
    if not starting.cancelled() and starting.exception() is not None:
        server.should_exit = True


@contextlib.asynccontextmanager
async def _running(engine: EngineClient, listener: EngineListener) -> AsyncIterator[None]:
    engine.start(listener)
    try:
        yield
    finally:
        await engine.stop()


def _engine_config(config: ServeConfig, folder: Path) -> EngineConfig:
    return EngineConfig(
        model_folder=str(folder),
        dtype=config.dtype,
        device=config.device,
        kernels=config.kernels,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        memory_budget=config.memory_budget,
        host_memory_budget=config.host_memory_budget,
        prefix_caching=config.prefix_caching,
        cuda_graphs=config.cuda_graphs,
        log_format=config.log_format,
    )


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is known before minutes of loading."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}:{port}: {error}; choose another --host or --port"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    """Where the server is reached, from its own machine."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say_ready(config: ServeConfig, listener: socket.socket, state: AppState) -> None:
    url = _url(listener)
    adapters = state.registry.catalog.all()
    served = [adapter.name for adapter in adapters if adapter.default is not None]
    shown = ", ".join(served[:_SHOWN]) + (", ..." if len(served) > _SHOWN else "")
    route = "completions"
    question: dict[str, object] = {"prompt": "To make tea, "}
    if state.tokenizer.has_chat_template:
        route = "chat/completions"
        question = {"messages": [{"role": "user", "content": "How do I make tea?"}]}
    body = {"model": [*served, state.model_name][0], "stream": True, "max_tokens": 60, **question}
    print(  # noqa: T201  # the one line a person at the terminal, or a script, waits for
        f"deltamux serves {config.served_model_name} with {len(served)} adapters "
        f"({shown or 'none'}); ready on {url}\n\n"
        f"  curl -N {url}/v1/{route} -H 'Content-Type: application/json' -d "
        f"'{json.dumps(body)}'\n",
        flush=True,
    )
