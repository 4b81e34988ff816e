"""Who calls: found out before anything of a request is read, and handed to every route.

A server with tenants answers nobody without a key, but for the three routes that say whether it
lives. A server without tenants takes everybody for the operator.
"""

from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..tenants.directory import TenantDirectory
from ..tenants.errors import KeyRefused
from ..tenants.tenant import Caller
from .errors import Unauthorized

_KEY = "deltamux.caller"
_FOR_EVERYBODY = frozenset({"/health", "/ready", "/version"})


class Authenticate:
    """Refuses requests without a good key, and notes who sent the others."""

    def __init__(self, app: ASGIApp, tenants: TenantDirectory) -> None:
        """Guard ``app``."""
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose sender is known, or that anybody may send."""
        if scope["type"] == "http" and scope["path"] not in _FOR_EVERYBODY:
            try:
                scope[_KEY] = self._tenants.caller(_bearer(scope))
            except KeyRefused as error:
                refusal = Unauthorized(str(error), headers={"WWW-Authenticate": "Bearer"})
                answer = JSONResponse(refusal.body(), refusal.status_code, refusal.headers)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> str | None:
    """The key of the Authorization header; None where there is none."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def caller_in(scope: Scope) -> Caller | None:
    """Who sent the request of ``scope``; None where that was not asked, or nobody is known."""
    return scope.get(_KEY)


def _caller_of(request: Request) -> Caller:
    return cast(Caller, request.scope[_KEY])


Calling = Annotated[Caller, Depends(_caller_of)]
