"""Who may send what: bodies that say they are JSON, bounded in size; management.

A server without tenants is managed from its own machine alone. One with tenants is managed with
keys, from anywhere: it does not trust its machine, since whatever a proxy there passes on comes
from it; and no web page can send a key that it was not given.
"""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..tenants.tenant import OPERATOR
from .caller import Calling
from .errors import BodyTooLarge, ManagementForbidden, UnsupportedMedia

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+))(?::[0-9]{1,5})?")
_FORM = "multipart/form-data"
_UPLOADS = "/v1/adapters"


def require_json(request: Request) -> None:
    """Refuse a body that does not say it is JSON.

    Raises:
        UnsupportedMedia: It does not.
    """
    # A web page can send a body of another type to a loopback port without asking first.
    if _media_type(request.headers.get("content-type", "")) != "application/json":
        raise UnsupportedMedia("Send the body with 'Content-Type: application/json'.")


def is_upload(request: Request) -> bool:
    """Whether the body is a form with files."""
    return _media_type(request.headers.get("content-type", "")) == _FORM


def _media_type(header: str) -> str:
    return header.partition(";")[0].strip().lower()


def _require_local_if_open(request: Request, caller: Calling) -> None:
    if caller == OPERATOR:
        _require_loopback(request)


def _require_admin(caller: Calling) -> None:
    if not caller.is_admin:
        raise ManagementForbidden("This needs an admin key.")


def _require_loopback(request: Request) -> None:
    # The host name is checked too: a page whose name is re-bound to 127.0.0.1 reaches this port
    # under its own name. A proxy on this machine shows itself by what it forwards for.
    proxied = any(name in request.headers for name in ("forwarded", "x-forwarded-for"))
    # A page of another server may send a form without asking first, and one that was let in by
    # --cors-origin any body.
    origin = request.headers.get("origin")
    if origin is not None and _host_of(origin) != request.headers.get("host"):
        raise ManagementForbidden(f"This server is not managed from the web page {origin}.")
    hosts = [request.client.host if request.client else "", _named_host(request)]
    if proxied or not all(map(_is_loopback, hosts)):
        raise ManagementForbidden(
            "This server is managed from its own machine only (127.0.0.1), or with admin keys."
        )


def _host_of(origin: str) -> str:
    """With its port; empty where the origin names none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


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


json_only = Depends(require_json)
local_if_open = Depends(_require_local_if_open)
admin_only = Depends(_require_admin)


class BodyLimit:
    """Refuses bodies over a size, by their announced length or as soon as they exceed it.

    Forms with files have a limit of their own where adapters are uploaded.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        """Guard ``app``."""
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body is small enough."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._limit(scope)
        if self._announced(scope) > most:
            error = self._refusal(most)
            await JSONResponse(error.body(), error.status_code)(scope, receive, send)
            return
        await self._app(scope, self._counting(receive, most), send)

    def _counting(self, receive: Receive, most: int) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise self._refusal(most)
            return message

        return counted

    def _limit(self, scope: Scope) -> int:
        kinds = [value for name, value in scope["headers"] if name == b"content-type"]
        form = bool(kinds) and _media_type(kinds[0].decode("latin-1")) == _FORM
        return self._max_upload_bytes if form and scope["path"] == _UPLOADS else self._max_bytes

    @staticmethod
    def _refusal(most: int) -> BodyTooLarge:
        return BodyTooLarge(f"The body is larger than {most} bytes.")

    @staticmethod
    def _announced(scope: Scope) -> int:
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        return int(lengths[0]) if lengths and lengths[0].isdigit() else 0
