"""HTTP as it comes from the wire, within bounds.

httptools parses fast and keeps what it has not understood yet, however much that is: a head, a
trailer or the size of a chunk without an end would fill the memory.
"""

import asyncio
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request's line and headers together; what most servers allow at most."""


class BoundedHttp(HttpToolsProtocol):
    """Refuses what goes on for too long without beginning or continuing a body."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """One connection."""
        super().__init__(config, server_state, app_state, _loop)
        self._unfinished = 0

    def data_received(self, data: bytes) -> None:
        """Parse what came; its callbacks tell whether that finished anything."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is longer than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of a body came."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self._unfinished = 0
        super().on_message_complete()
