"""Every refusal of the HTTP API, in OpenAI's shape: {"error": {message, type, param, code}}.

ApiError (a starlette HTTPException, so that it passes through framework code unchanged)
├── InvalidRequest      400  the body is wrong; ``param`` names the field
├── InvalidUserInput    400  vLLM's name for a wrong load or unload
├── Unauthorized        401  no key, or none that is good
├── ManagementForbidden 403  management by whoever may not, or a source that is not allowed
├── NotFound            404  unknown model, adapter or path
├── MethodNotAllowed    405
├── BodyTooLarge        413  a body over the limit
├── UnsupportedMedia    415  a body that does not say it is JSON
├── TooManyRequests     429  the queue is full, or a tenant's limit is reached
├── InternalError       500  the engine gave a sequence up
├── InsufficientStorage 507  the adapter store is full
├── NotServed           501  a route of a later release
├── BadGateway          502  a source of adapters does not answer as it should
├── ServiceUnavailable  503  the engine is down, or an adapter cannot be loaded now
└── DeadlineExceeded    504  the request waited longer than it allows
"""

from collections.abc import Awaitable, Callable, Mapping
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ...adapters.errors import AdapterError, AdapterNotFound
from ..composition import CompositionRefused
from ..engine.errors import EngineError, QueueFull
from ..store.errors import (
    AdapterUnavailable,
    FetchFailed,
    QuotaExceeded,
    RegistryError,
    SourceForbidden,
    StoreFull,
    UnknownAdapter,
    UnknownModel,
)
from ..tenants.errors import LimitExceeded, TenantError, UnknownTenant
from .rate_headers import rate_headers
from .request_id import HEADER, request_id

_MAX_MESSAGE = 1000
_MAX_PARAM = 100


class ApiError(HTTPException):
    """A refusal with everything its answer needs."""

    status = 500
    kind = "InternalServerError"

    def __init__(
        self, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Hold the message; ``param`` is the request field at fault."""
        super().__init__(self.status, message, headers)
        self.param = param

    def body(self) -> dict[str, object]:
        """The JSON object a client gets."""
        return error_body(self.detail, self.kind, self.status, self.param)


class InvalidRequest(ApiError):
    """The body is wrong; ``param`` names the field."""

    status = 400
    kind = "invalid_request_error"


class InvalidUserInput(ApiError):
    """A load or unload that makes no sense."""

    status = 400
    kind = "InvalidUserInput"


class Unauthorized(ApiError):
    """No API key, or none that is good."""

    status = 401
    kind = "AuthenticationError"


class ManagementForbidden(ApiError):
    """Adapter management by whoever may not, or a source that is not allowed."""

    status = 403
    kind = "PermissionDeniedError"


class NotFound(ApiError):
    """An unknown model, adapter or path."""

    status = 404
    kind = "NotFoundError"


class MethodNotAllowed(ApiError):
    """A path that exists, asked in a way it does not answer."""

    status = 405
    kind = "MethodNotAllowedError"


class BodyTooLarge(ApiError):
    """More bytes than a body may have."""

    status = 413
    kind = "RequestEntityTooLargeError"


class UnsupportedMedia(ApiError):
    """A body that does not say it is JSON."""

    status = 415
    kind = "UnsupportedMediaTypeError"


class TooManyRequests(ApiError):
    """The engine's queue is full, or a tenant asks for more than its limits allow."""

    status = 429
    kind = "RateLimitError"


class InternalError(ApiError):
    """The engine gave a sequence up."""


class InsufficientStorage(ApiError):
    """The adapter store may not take more of the disk."""

    status = 507
    kind = "InsufficientStorageError"


class NotServed(ApiError):
    """A route that a later release will serve."""

    status = 501
    kind = "NotImplementedError"


class BadGateway(ApiError):
    """A source of adapters does not answer as it should."""

    status = 502
    kind = "BadGatewayError"


class ServiceUnavailable(ApiError):
    """The engine is down, or an adapter cannot be loaded now."""

    status = 503
    kind = "ServiceUnavailableError"


class DeadlineExceeded(ApiError):
    """The request had not begun to run by its deadline."""

    status = 504
    kind = "DeadlineExceededError"


def error_body(message: str, kind: str, code: int, param: str | None) -> dict[str, object]:
    """OpenAI's error object; what quotes a client at length is cut short."""
    printable = message[:_MAX_MESSAGE].encode("utf-8", "replace").decode()
    field = None if param is None else param[:_MAX_PARAM]
    return {"error": {"message": printable, "type": kind, "param": field, "code": code}}


def from_engine(error: EngineError) -> ApiError:
    """The answer for an engine that cannot serve; every one of them is worth a retry."""
    if isinstance(error, QueueFull):
        return TooManyRequests(str(error), headers={"Retry-After": "1"})
    return ServiceUnavailable(str(error), headers={"Retry-After": "5"})


def from_validation(error: RequestValidationError) -> InvalidRequest:
    """The first thing that is wrong with a body, and the field it is wrong in."""
    first = error.errors()[0]
    context = first.get("ctx", {})
    if first["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {context['error']}.")
    path = [str(part) for part in first["loc"][1:]]  # the first says: body or query
    param = context.get("param") or (path[0] if path else None)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"The field {'.'.join(path)!r} is not supported.", param)
    where = ".".join(path) or param or "body"
    return InvalidRequest(f"{where}: {first['msg']}", param)


def from_registry(error: RegistryError) -> ApiError:
    """The answer for a name that cannot be used as asked."""
    message = str(error)
    match error:
        case UnknownModel():
            return NotFound(message, "model")
        case AdapterUnavailable():
            seconds = str(ceil(error.retry_after))
            return ServiceUnavailable(message, "model", headers={"Retry-After": seconds})
        case UnknownAdapter():
            return NotFound(message)
        case SourceForbidden():
            return ManagementForbidden(message, "source")
        case QuotaExceeded():
            return ManagementForbidden(message)
        case FetchFailed():
            return BadGateway(message, "source")
        case StoreFull():
            return InsufficientStorage(message)
    return InvalidUserInput(message)


def from_limit(error: LimitExceeded) -> TooManyRequests:
    """The answer for more than a tenant's limits allow, and what is left of them."""
    headers = dict(rate_headers(error.allowances))
    if error.retry_after is not None:
        headers["Retry-After"] = str(ceil(error.retry_after))
    return TooManyRequests(str(error), headers=headers)


def from_tenant(error: TenantError) -> ApiError:
    """The answer for what cannot be done to a tenant."""
    if isinstance(error, LimitExceeded):
        return from_limit(error)
    refused = NotFound if isinstance(error, UnknownTenant) else InvalidUserInput
    return refused(str(error))


def from_adapter(error: AdapterError) -> ApiError:
    """The answer for an adapter that is refused."""
    refusal = NotFound if isinstance(error, AdapterNotFound) else InvalidUserInput
    return refusal(f"{type(error).__name__}: {error}")


def from_http(error: HTTPException, request: Request) -> ApiError:
    """The framework's own refusals: no such path, no such method, a body it cannot read."""
    message = str(error.detail)
    if error.status_code == 404:
        return NotFound(f"{message}: {request.url.path}")
    if error.status_code == 405:
        return MethodNotAllowed(f"{message}: {request.method}", headers=error.headers)
    return InvalidRequest(message)


Translate = Callable[[Any, Request], ApiError]

_TRANSLATIONS: dict[type[Exception], Translate] = {
    ApiError: lambda error, _: error,
    HTTPException: from_http,
    RequestValidationError: lambda error, _: from_validation(error),
    EngineError: lambda error, _: from_engine(error),
    RegistryError: lambda error, _: from_registry(error),
    CompositionRefused: lambda error, _: InvalidRequest(f"{error}.", "adapters"),
    AdapterError: lambda error, _: from_adapter(error),
    TenantError: lambda error, _: from_tenant(error),
    # The traceback goes to the server's log alone: starlette raises the error again after this.
    Exception: lambda _, __: InternalError("Internal server error."),
}


def install(app: FastAPI) -> None:
    """Give every failure of the app its answer."""
    for kind, translate in _TRANSLATIONS.items():
        app.add_exception_handler(kind, _handler(translate))


def _handler(translate: Translate) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        refusal = translate(error, request)
        # What nobody expected is answered outside of all that names requests.
        headers = {**(refusal.headers or {}), HEADER: request_id(request.scope)}
        return JSONResponse(refusal.body(), refusal.status_code, headers)

    return answer
