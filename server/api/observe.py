"""Every request once it was answered: a line in the log, a count of its status, and a span."""

import logging
from time import monotonic

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..logs import fields
from ..metrics.metrics import Metrics
from ..metrics.request import RequestRecord
from ..tracing import RequestTracer
from .caller import caller_in
from .request_id import request_id

logger = logging.getLogger("deltamux.access")

_KEY = "deltamux.record"


def note(scope: Scope, record: RequestRecord) -> None:
    """This is what is known of the request of ``scope``."""
    scope[_KEY] = record


class Observe:
    """Watches requests pass, and tells of them when they have ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: RequestTracer | None) -> None:
        """Watch the requests of ``app``."""
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = monotonic()
        status = 500  # what a failure that nobody expected is answered with, further out

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._ended(scope, status, monotonic() - begun)

    def _ended(self, scope: Scope, status: int, seconds: float) -> None:
        record: RequestRecord | None = scope.get(_KEY)
        self._metrics.answered(status)
        told = {} if record is None else _of_record(record)
        line = f"{scope['method']} {_path(scope)} {status}"
        logger.info(line, extra=fields(**_of_request(scope, status, seconds), **told))
        if record is not None and self._tracer is not None:
            self._tracer.ended(record, Headers(scope=scope), status)


def _path(scope: Scope) -> str:
    """As it was sent, percent signs and all, so that nothing in it can pass for another line."""
    path: bytes = scope.get("raw_path") or b""
    return path.decode("ascii", "backslashreplace")


def _of_request(scope: Scope, status: int, seconds: float) -> dict[str, object]:
    caller = caller_in(scope)
    tenant = None if caller is None or caller.tenant is None else caller.tenant.name
    return {
        "request_id": request_id(scope),
        "method": scope["method"],
        "path": _path(scope),
        "status": status,
        "seconds": round(seconds, 6),
        "tenant": tenant,
        "key_id": (caller.key_id or None) if caller else None,
    }


def _of_record(record: RequestRecord) -> dict[str, object]:
    consumer, counts = record.consumer, record.counts
    return {
        "id": record.asked.id,
        "model": consumer.adapter or consumer.base,
        "digest": consumer.digest or None,
        "stream": record.asked.stream,
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "completion_tokens": counts.completion_tokens,
        "queue_seconds": _rounded(record.queue_seconds),
        "first_token_seconds": _rounded(record.first_token_seconds),
        "finish_reasons": ",".join(record.finish_reasons) or None,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
