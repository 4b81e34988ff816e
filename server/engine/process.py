"""The engine process: builds the engine, then alternates between commands and steps.

It ends on ``Shutdown``, when the HTTP process goes away, or when anything raises: the HTTP process
sees it end and starts another.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING

import msgspec
import zmq

from ..logs import configure
from ..model.errors import ModelError
from ..text.tokenizer_source import TokenizerError
from .config import EngineConfig
from .errors import EngineMisconfigured
from .messages import Command, EngineFailed, EngineInfo, Event, Shutdown, TokenizerRead

if TYPE_CHECKING:
    from .core import Engine
    from .host_tier import HostTier

logger = logging.getLogger(__name__)

_SPIN_COUNT = "5000"
"""Turns an idle OpenMP thread waits actively before it sleeps: about the gap between two kernels.

With the 300,000 of libgomp, a thread that lost its core holds up the other for a time slice: beside
one busy process on two cores, a decode step of 75 ms then takes 520 ms instead of 135.
"""


_SWITCH_SECONDS = 0.001
"""How long the step loop waits for the interpreter while the adapter loader has it, at most.

With Python's 5 ms, one load can hold up every operation of a step by that much.
"""


def let_idle_threads_sleep() -> None:
    """Have threads of torch that wait for work give their core to others soon.

    The setting is read when torch loads libgomp, which must not have happened yet.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def run_engine(config: EngineConfig, command_url: str, event_url: str) -> None:
    """Entry point of the process; returns when it is told to shut down."""
    let_idle_threads_sleep()
    sys.setswitchinterval(_SWITCH_SECONDS)
    if config.kernels == "interpret":
        # Read when triton is imported, by which its functions become interpreted ones for good.
        os.environ["TRITON_INTERPRET"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure(config.log_format)
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.connect(command_url)
    events.connect(event_url)
    mailbox = _Mailbox(commands, events)
    try:
        _serve(config, mailbox)
    except (EngineMisconfigured, ModelError, TokenizerError) as error:
        mailbox.send([EngineFailed(str(error))])
        raise SystemExit(1) from None
    except Exception as error:
        logger.exception("the engine stops")
        mailbox.send([EngineFailed(f"{type(error).__name__}: {error}")])
        raise SystemExit(1) from error
    finally:
        gc.unfreeze()  # what is frozen would count as leaked when the interpreter ends
        context.destroy(linger=1000)


def _build(config: EngineConfig, mailbox: "_Mailbox") -> "tuple[Engine, HostTier, EngineInfo]":
    # Here and not above: the HTTP process imports this module too and has no use for torch.
    from ...kernels.memory import give_back_freed
    from ..text.reader import read_tokenizer
    from .build import build_engine

    tokenizer = read_tokenizer(config.model_folder)
    mailbox.send([TokenizerRead(tokenizer)])
    built = build_engine(config, tokenizer)
    give_back_freed()
    return built


def _serve(config: EngineConfig, mailbox: "_Mailbox") -> None:
    engine, host, info = _build(config, mailbox)
    # What is there now stays: the collector would look through all of it, between two tokens.
    gc.collect()
    gc.freeze()
    mailbox.watch(host.wakeup)
    mailbox.send([info])
    while True:
        for command in mailbox.receive(0 if engine.has_work else engine.deadlines.milliseconds()):
            if isinstance(command, Shutdown):
                engine.close()
                return
            engine.handle(command)
        engine.take_loads()
        engine.expire()
        if engine.has_work:
            engine.step()
        mailbox.send(engine.drain())


class _Mailbox:
    """The two sockets, and what else wakes an idle engine."""

    def __init__(self, commands: "zmq.Socket[bytes]", events: "zmq.Socket[bytes]") -> None:
        self._commands = commands
        self._events = events
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._encoder = msgspec.msgpack.Encoder()
        self._poller = zmq.Poller()
        self._poller.register(commands, zmq.POLLIN)
        self._wakeup: int | None = None
        parent = multiprocessing.parent_process()
        self._parent = None if parent is None else parent.sentinel
        if self._parent is not None:
            self._poller.register(self._parent, zmq.POLLIN)

    def watch(self, wakeup: int) -> None:
        """Wake also when this eventfd is written."""
        self._wakeup = wakeup
        self._poller.register(wakeup, zmq.POLLIN)

    def receive(self, milliseconds: int | None) -> list[Command]:
        """All commands that are there; sleeps for that long, or until there is something to do."""
        ready = dict(self._poller.poll(milliseconds))
        if self._parent in ready:
            return [Shutdown()]
        if self._wakeup is not None and self._wakeup in ready:
            os.eventfd_read(self._wakeup)
        commands: list[Command] = []
        while self._commands.poll(0):
            commands.append(self._decoder.decode(self._commands.recv()))
        return commands

    def send(self, events: list[Event]) -> None:
        """Pass events to the HTTP process."""
        for event in events:
            self._events.send(self._encoder.encode(event))
