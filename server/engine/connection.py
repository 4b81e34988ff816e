"""The two sockets between the HTTP process and one engine process, on the HTTP process's side."""

import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import msgspec
import zmq
import zmq.asyncio

from .messages import Command, Event


class Connection:
    """The sockets to one engine process; a new process gets new ones, so nothing stale arrives."""

    def __init__(
        self, commands: "zmq.Socket[bytes]", events: zmq.asyncio.Socket, folder: str
    ) -> None:
        """Bind both sockets in ``folder``."""
        self.command_url = f"ipc://{folder}/commands"
        self.event_url = f"ipc://{folder}/events"
        self._commands = commands
        self._events = events
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)
        for socket, url in ((commands, self.command_url), (events, self.event_url)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.set_hwm(0)
            socket.bind(url)

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

    async def remaining(self) -> AsyncGenerator[Event, None]:
        """What an ended engine has still said."""
        while await self._events.poll(50):
            yield await self.receive()


@contextmanager
def open_connection() -> Iterator[Connection]:
    """A connection in a private temporary folder, gone when the block is left.

    Raises:
        OSError: The folder cannot be made.
        ZMQError: The sockets cannot be bound there.
    """
    # Closing the sockets comes first, whatever happens: a context waits for those still open.
    with (
        tempfile.TemporaryDirectory(prefix="deltamux-") as folder,
        # A plain socket for commands: one is sent at once or not at all, and never awaited.
        zmq.Context() as plain,
        plain.socket(zmq.PUSH) as commands,
        zmq.asyncio.Context() as awaited,
        awaited.socket(zmq.PULL) as events,
    ):
        yield Connection(commands, events, folder)
