"""Who may send what: bodies that say they are JSON, bounded in size; management from here alone."""

import re
from ipaddress import ip_address

from fastapi import Depends, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import BodyTooLarge, ManagementForbidden, UnsupportedMedia

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+))(?::[0-9]{1,5})?")


def _require_json(request: Request) -> None:
    # A web page can send a body of another type to a loopback port without asking first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMedia("Send the body with 'Content-Type: application/json'.")


def _require_loopback(request: Request) -> None:
    # The host name is checked too: a page whose name is re-bound to 127.0.0.1 reaches this port
    # under its own name. A proxy on this machine shows itself by what it forwards for.
    proxied = any(name in request.headers for name in ("forwarded", "x-forwarded-for"))
    hosts = [request.client.host if request.client else "", _named_host(request)]
    if proxied or not all(map(_is_loopback, hosts)):
        raise ManagementForbidden("Adapters are managed from this machine only (127.0.0.1).")


def _named_host(request: Request) -> str:
    """The host of the one Host header, without its port; empty where there is no such."""
    match request.headers.getlist("host"):
        case [named] if host := _HOST.fullmatch(named):
            return host[1] or host[2]
    return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


json_only = Depends(_require_json)
loopback_only = Depends(_require_loopback)


class BodyLimit:
    """Refuses bodies over a size, by their announced length or as soon as they exceed it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Guard ``app``."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body is small enough."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._announced(scope) > self._max_bytes:
            error = self._refusal()
            await JSONResponse(error.body(), error.status_code)(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._refusal()
            return message

        return counted

    def _refusal(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is larger than {self._max_bytes} bytes.")

    @staticmethod
    def _announced(scope: Scope) -> int:
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        return int(lengths[0]) if lengths and lengths[0].isdigit() else 0
