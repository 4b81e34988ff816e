"""``X-Request-Id``: a client's own name for its request, or one made here, on every answer."""

import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
_KEY = "deltamux.request_id"
_GOOD = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Names each request, and says its name in the headers of the answer."""

    def __init__(self, app: ASGIApp) -> None:
        """Name the requests of ``app``."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and its id with the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id(scope)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        await self._app(scope, receive, named)


def request_id(scope: Scope) -> str:
    """The request's id; made at its first use where the client gave none that can be one."""
    if _KEY not in scope:
        given = Headers(scope=scope).get(HEADER, "")
        scope[_KEY] = given if _GOOD.fullmatch(given) else f"req-{uuid4().hex}"
    name: str = scope[_KEY]
    return name
