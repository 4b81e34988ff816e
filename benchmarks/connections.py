"""Connections of a load generator: one for each request in flight, none shared.

httpx's own pool looks at every connection whenever a request starts or ends, which at 64 streams
costs more than all the tokens do. Here each connection is a pool of one, so that the cost does not
grow with the number of streams.
"""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cached_property
from typing import cast

import httpx


class Connections(httpx.AsyncBaseTransport):
    """Gives a request the connection that was idle for the shortest time, or a new one."""

    def __init__(self, *, reuse: bool = True) -> None:
        """Without any connection yet; ``reuse`` none with a server that closes them unannounced."""
        self._idle: list[httpx.AsyncBaseTransport] = []
        self._reuse = reuse

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; its connection is idle again when the response is closed."""
        connection = self._idle.pop() if self._idle else self._open(request.url.scheme)
        response = await connection.handle_async_request(request)
        stream = cast(httpx.AsyncByteStream, response.stream)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Stream(stream, connection, self._release),
            extensions=response.extensions,
        )

    async def _release(self, connection: httpx.AsyncBaseTransport) -> None:
        if self._reuse:
            self._idle.append(connection)
        else:
            await connection.aclose()

    def _open(self, scheme: str) -> httpx.AsyncBaseTransport:
        context = self._tls if scheme == "https" else self._no_tls
        return httpx.AsyncHTTPTransport(verify=context, trust_env=False)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context(trust_env=False)

    @cached_property
    def _no_tls(self) -> ssl.SSLContext:
        """Unused: without one, httpx makes one for every transport, which takes milliseconds."""
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    async def aclose(self) -> None:
        """Close the idle connections; no request may be in flight."""
        for connection in self._idle:
            await connection.aclose()
        self._idle.clear()


class _Stream(httpx.AsyncByteStream):
    """The body of a response, which gives the connection back."""

    def __init__(
        self,
        body: httpx.AsyncByteStream,
        connection: httpx.AsyncBaseTransport,
        release: Callable[[httpx.AsyncBaseTransport], Awaitable[None]],
    ) -> None:
        self._body = body
        self._connection = connection
        self._release = release

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body.__aiter__()

    async def aclose(self) -> None:
        try:
            await self._body.aclose()
        finally:
            await self._release(self._connection)
