"""Answers that last: server-sent events, and noticing that the client has gone."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.errors import EngineError
from .errors import ApiError, from_engine

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection; nobody waits for an answer."""


async def answer_gone_client(_: Request, __: Exception) -> Response:
    """An answer nobody reads; the status is what access logs by custom show for this."""
    return Response(status_code=499)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    ``receive`` must have delivered the whole request body.

    Raises:
        ClientGone: The client went away; ``work`` has ended.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Streams chunks as server-sent events and ends with ``[DONE]``.

    A failure on the way is sent as an error object and ends the stream without ``[DONE]``. However
    the answer ends, the chunks' generator is closed before it returns; starlette's own streaming
    response leaves that to the garbage collector and notices a client's leaving at the next write.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[msgspec.Struct, None]) -> None:
        """Send ``chunks``, each as one event."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 - ASGI's signature
        receive: Receive,
        send: Send,
    ) -> None:
        """Send the answer, as long as the client is there; its leaving is no error."""
        async with aclosing(self._chunks):
            with suppress(ClientGone):
                await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(_events(self._chunks)) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(chunks: AsyncGenerator[msgspec.Struct, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in chunks:
            yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    except EngineError as error:
        yield _event_of(from_engine(error))
    except ApiError as error:
        yield _event_of(error)
    else:
        yield _DONE


def _event_of(error: ApiError) -> bytes:
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"
