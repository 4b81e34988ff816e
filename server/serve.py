"""``deltamux serve``: starts the engine and the HTTP application, and stops them in order."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn

from ..adapters.errors import AdapterError
from ..adapters.files import is_adapter_folder
from .api.app import create_app
from .api.registry import AdapterRegistry, AlreadyLoaded, RegistryError
from .api.state import AppState
from .config import ServeConfig
from .engine.client import EngineClient, EngineListener
from .engine.config import EngineConfig
from .engine.errors import EngineError
from .metrics import Metrics
from .model.errors import ModelError
from .model.source import resolve_model
from .text.tokenizer import Tokenizer, TokenizerError

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 5
"""How long open streams may go on after the signal to stop."""


class ServeError(Exception):
    """The server cannot start. The message says why and what to do."""


def run(config: ServeConfig) -> None:
    """Serve until a signal ends the process.

    Raises:
        ServeError: The model, an ``--adapter`` or the address cannot be served.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # uvicorn raises the signal again when it has ended; by default that ends the process before
    # the engine is.
    signal.signal(signal.SIGTERM, _exit)
    try:
        listener = _bind(config.host, config.port)
        folder = resolve_model(config.model, config.state_dir)
        asyncio.run(_serve(config, folder, listener))
    except (ModelError, TokenizerError, EngineError, OSError) as error:
        raise ServeError(str(error)) from error


def _exit(*_: object) -> None:
    raise SystemExit(0)


async def _serve(config: ServeConfig, folder: Path, listener: socket.socket) -> None:
    metrics = Metrics(config.served_model_name)
    engine = EngineClient(_engine_config(config, folder), config.max_waiting)
    registry = AdapterRegistry(config.served_model_name, engine)
    async with _running(engine, EngineListener(metrics.step, registry.lose)):
        tokenizer = await asyncio.to_thread(Tokenizer.from_pretrained, folder)
        state = AppState(engine, tokenizer, registry, metrics, model_root=str(folder))
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(state),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            )
        )
        starting = asyncio.create_task(_start_up(config, engine, state, listener))
        starting.add_done_callback(lambda task: _stop_if_failed(task, server))
        await server.serve(sockets=[listener])
        if starting.done():
            starting.result()
        else:
            # A signal came first.
            starting.cancel()


async def _start_up(
    config: ServeConfig, engine: EngineClient, state: AppState, listener: socket.socket
) -> None:
    await engine.ready()
    await _register_adapters(config, state.registry)
    state.started.set()
    _say_ready(config, listener, state)


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


async def _register_adapters(config: ServeConfig, registry: AdapterRegistry) -> None:
    """All named adapters, of which each must be good; then those of the folders."""
    for name, path in config.adapters:
        try:
            await registry.load(name, str(path.resolve()))
        except (AdapterError, RegistryError) as error:
            raise ServeError(f"--adapter {name}={path}: {error}") from error
    for folder in config.adapter_dirs:
        for path in sorted(path for path in folder.iterdir() if is_adapter_folder(path)):
            await _register(path, registry)


async def _register(path: Path, registry: AdapterRegistry) -> None:
    try:
        entry = await registry.register(path.name, str(path.resolve()))
    except AlreadyLoaded as error:
        logger.warning("the adapter at %s is not served: %s", path, error)
    else:
        if entry.error is not None:
            logger.warning("adapter %s is not served: %s", entry.name, entry.error)


def _say_ready(config: ServeConfig, listener: socket.socket, state: AppState) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    served = [entry.name for entry in state.registry.entries() if entry.error is None]
    route = "completions"
    question: dict[str, object] = {"prompt": "To make tea, "}
    if state.tokenizer.has_chat_template:
        route = "chat/completions"
        question = {"messages": [{"role": "user", "content": "How do I make tea?"}]}
    body = {"model": [*served, state.model_name][0], "stream": True, "max_tokens": 60, **question}
    print(  # noqa: T201  # the one line a person at the terminal, or a script, waits for
        f"deltamux serves {config.served_model_name} with {len(served)} adapters "
        f"({', '.join(served) or 'none'}); ready on {url}\n\n"
        f"  curl -N {url}/v1/{route} -H 'Content-Type: application/json' -d "
        f"'{json.dumps(body)}'\n",
        flush=True,
    )
