"""The OpenAPI page: what FastAPI finds in the routes, with answers, examples and errors added."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .answers import ChatCompletion, Completion, EmbeddingList

_REF = "#/components/schemas/{name}"
_JSON = "application/json"


class ErrorDetail(msgspec.Struct, frozen=True):
    """What was wrong: ``param`` is the field at fault, ``code`` the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Every refusal."""

    error: ErrorDetail


_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no good API key, on a server that has tenants.",
    403: "This needs an admin key; or management from another machine or a web page.",
    404: "There is no such model, adapter or path.",
    413: "The body is too large.",
    415: "The body does not say that it is JSON.",
    429: "The queue is full, or a tenant's limit is reached; see `Retry-After`.",
    500: "The engine gave this request up.",
    501: "A later release will serve this.",
    503: "The engine is starting or restarting; try again after `Retry-After` seconds.",
    504: "The request had not begun to run when its `deadline_ms` had passed.",
    507: "Copies of adapters may take no more of the disk.",
}
_BODY = (400, 413, 415)
_GENERATION = (*_BODY, 404, 429, 500, 503, 504)
_MANAGEMENT = (403, 404)


@dataclass(frozen=True, slots=True)
class RouteDoc:
    """What is added to one route.

    Attributes:
        answer: An example of what it answers; its text where that is not JSON.
        errors: Statuses it may refuse with.
        request: An example of a body, if it takes one.
        struct: The type of its answer, where there is one.
        status: Of a good answer.
        media: Type of the answer.
        needs_key: Whether a server that has tenants asks for a key.
    """

    answer: Any
    errors: tuple[int, ...] = ()
    request: Mapping[str, Any] | None = None
    struct: type[msgspec.Struct] | None = None
    status: int = 200
    media: str = _JSON
    needs_key: bool = True


_USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 7,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_ENDED = {"finish_reason": "stop", "stop_reason": None, "logprobs": None}
_COMPLETION = {
    "id": "cmpl-3f2a",
    "object": "text_completion",
    "created": 1767225600,
    "model": "pirate",
    "choices": [{"index": 0, "text": " the capital of Germany.", **_ENDED}],
    "usage": _USAGE,
}
_CHAT = {
    "id": "chatcmpl-3f2a",
    "object": "chat.completion",
    "created": 1767225600,
    "model": "pirate",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Arrr, Berlin!", "refusal": None},
            **_ENDED,
        }
    ],
    "usage": _USAGE,
}
_EMBEDDINGS = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
    "model": "pirate",
    "usage": {"prompt_tokens": 1, "total_tokens": 1},
}
_MODEL = {
    "id": "pirate",
    "object": "model",
    "created": 1767225600,
    "owned_by": "deltamux",
    "root": "/srv/adapters/pirate",
    "parent": "smollm2",
    "max_model_len": 8192,
    "permission": [],
}
_KEY = {"id": "3f2a91c03f2a91c0", "object": "tenant.key", "expires": None}
_TENANT = {
    "name": "acme",
    "object": "tenant",
    "role": "user",
    "origin": "database",
    "created": 1767225600,
    "disabled": False,
    "keys": [_KEY],
    "adapters": ["acme-*"],
    "default": "support",
    "aliases": {"support": {"acme-v7": 90, "acme-v8": 10}},
    "weight": 2,
    "limits": {"requests_per_minute": 600},
    "shares_cache": False,
}
_SECRET = {"key": "sk-deltamux-..."}
_DIGEST = "sha256:" + "3f2a91c0" * 8
_ADAPTER = {
    "name": "pirate",
    "object": "adapter",
    "state": "on_device",
    "error": None,
    "source": "/srv/adapters/pirate",
    "path": "/var/lib/deltamux/adapters/3f2a91c0",
    "origin": "",
    "owner": None,
    "created": 1767225600,
    "pinned": False,
    "hits": 12,
    "last_used": 1767229200,
    "digest": _DIGEST,
    "info": {"kind": "lora", "library": "peft", "rank": 16},
    "versions": [{"digest": _DIGEST, "default": True, "state": "on_device"}],
}

_AMOUNTS = {
    "requests": 3,
    "prompt_tokens": 120,
    "cached_tokens": 32,
    "completion_tokens": 45,
    "undelivered_requests": 0,
    "undelivered_prompt_tokens": 0,
    "undelivered_completion_tokens": 0,
    "total_tokens": 165,
}
_CONSUMER = {
    "day": "2026-01-01",
    "base": "smollm2",
    "tenant": "acme",
    "key_id": "3f2a91c03f2a91c0",
    "adapter": "pirate",
    "digest": "3f2a91c0" * 8,
}
_USED = {"object": "usage", "data": [{**_CONSUMER, **_AMOUNTS}], "total": _AMOUNTS}

DOCS: Mapping[tuple[str, str], RouteDoc] = {
    ("post", "/v1/completions"): RouteDoc(
        _COMPLETION,
        _GENERATION,
        {"model": "pirate", "prompt": "Berlin is", "max_tokens": 16, "temperature": 0},
        Completion,
    ),
    ("post", "/v1/chat/completions"): RouteDoc(
        _CHAT,
        _GENERATION,
        {"model": "pirate", "messages": [{"role": "user", "content": "Capital of Germany?"}]},
        ChatCompletion,
    ),
    ("post", "/v1/embeddings"): RouteDoc(
        _EMBEDDINGS, _GENERATION, {"model": "pirate", "input": ["Berlin", "Rome"]}, EmbeddingList
    ),
    ("get", "/v1/models"): RouteDoc({"object": "list", "data": [_MODEL]}),
    ("get", "/v1/models/{model}"): RouteDoc(_MODEL, (404, 503)),
    ("post", "/tokenize"): RouteDoc(
        {"count": 2, "max_model_len": 8192, "tokens": [19556, 28], "token_strs": None},
        (*_BODY, 404, 503),
        {"prompt": "Hello,"},
    ),
    ("post", "/detokenize"): RouteDoc(
        {"prompt": "Hello,"}, (*_BODY, 404, 503), {"tokens": [19556, 28]}
    ),
    ("get", "/v1/adapters"): RouteDoc({"object": "list", "data": [_ADAPTER]}, (400, 403)),
    ("post", "/v1/adapters"): RouteDoc(
        _ADAPTER,
        (*_BODY, *_MANAGEMENT, 503, 507),
        {"name": "pirate", "path": "/srv/adapters/pirate"},
        status=201,
    ),
    ("get", "/v1/adapters/{name}"): RouteDoc(_ADAPTER, _MANAGEMENT),
    ("delete", "/v1/adapters/{name}"): RouteDoc(
        {"name": "pirate", "object": "adapter", "deleted": True}, (*_MANAGEMENT, 503)
    ),
    ("patch", "/v1/adapters/{name}"): RouteDoc(
        _ADAPTER, (*_BODY, *_MANAGEMENT, 503), {"version": "3f2a91c0", "pinned": True}
    ),
    ("post", "/v1/load_lora_adapter"): RouteDoc(
        "Success: LoRA adapter 'pirate' added successfully.",
        (*_BODY, *_MANAGEMENT, 503, 507),
        {"lora_name": "pirate", "lora_path": "/srv/adapters/pirate"},
        media="text/plain",
    ),
    ("post", "/v1/unload_lora_adapter"): RouteDoc(
        "Success: LoRA adapter 'pirate' removed successfully.",
        (*_BODY, *_MANAGEMENT, 503),
        {"lora_name": "pirate"},
        media="text/plain",
    ),
    ("get", "/v1/tenants"): RouteDoc({"object": "list", "data": [_TENANT]}, (403,)),
    ("post", "/v1/tenants"): RouteDoc(
        {**_TENANT, **_SECRET},
        (*_BODY, 403),
        {"name": "acme", "adapters": ["acme-*"], "default": "acme-v7"},
        status=201,
    ),
    ("get", "/v1/tenants/{name}"): RouteDoc(_TENANT, _MANAGEMENT),
    ("patch", "/v1/tenants/{name}"): RouteDoc(
        _TENANT,
        (*_BODY, *_MANAGEMENT),
        {"aliases": {"support": {"acme-v7": 50, "acme-v8": 50}}, "disabled": False},
    ),
    ("delete", "/v1/tenants/{name}"): RouteDoc(
        {"name": "acme", "object": "tenant", "deleted": True}, _MANAGEMENT
    ),
    ("post", "/v1/tenants/{name}/keys"): RouteDoc(
        {**_KEY, **_SECRET},
        (*_BODY, *_MANAGEMENT),
        {"overlap_seconds": 86400},
        status=201,
    ),
    ("delete", "/v1/tenants/{name}/keys/{key_id}"): RouteDoc(
        {"id": "3f2a91c03f2a91c0", "object": "tenant.key", "deleted": True}, _MANAGEMENT
    ),
    ("get", "/health"): RouteDoc({"status": "ok"}, needs_key=False),
    ("get", "/ready"): RouteDoc({"status": "ready"}, (503,), needs_key=False),
    ("get", "/version"): RouteDoc({"version": "0.1.0"}, needs_key=False),
    ("get", "/v1/usage"): RouteDoc(_USED, (400, 403)),
    ("get", "/metrics"): RouteDoc("vllm:num_requests_running 2.0", (403,), media="text/plain"),
}


def document(app: FastAPI) -> None:
    """Make the page of ``app`` complete; it is put together when it is first asked for."""

    def page() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _completed(found)
        return app.openapi_schema

    app.openapi = page  # type: ignore[method-assign]  # FastAPI's own way to extend the page


def _completed(page: dict[str, Any]) -> dict[str, Any]:
    structs = [each.struct for each in DOCS.values() if each.struct is not None]
    _, schemas = msgspec.json.schema_components([*structs, ErrorAnswer], ref_template=_REF)
    components = page.setdefault("components", {}).setdefault("schemas", {})
    # FastAPI's own shape of refusals, which is never sent.
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)
    components |= schemas
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            if (method, path) in DOCS:
                _complete(operation, DOCS[method, path])
    return page


def _complete(operation: dict[str, Any], doc: RouteDoc) -> None:
    if doc.request is not None:
        operation["requestBody"]["content"][_JSON]["example"] = doc.request
    refused = sorted({*doc.errors, 401}) if doc.needs_key else sorted(doc.errors)
    responses = {str(status): _refusal(status) for status in refused}
    if doc.answer is not None:
        schema = _ref(doc.struct) if doc.struct else {"type": _type_of(doc.answer)}
        content = {doc.media: {"schema": schema, "example": doc.answer}}
        good = {"description": "The answer.", "content": content}
        responses = {str(doc.status): good, **responses}
    operation["responses"] = responses


def _refusal(status: int) -> dict[str, Any]:
    content = {_JSON: {"schema": _ref(ErrorAnswer)}}
    return {"description": _ERRORS[status], "content": content}


def _ref(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}


def _type_of(answer: object) -> str:
    return "string" if isinstance(answer, str) else "object"
