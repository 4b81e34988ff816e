"""Puts the routes together; everything they work with comes in as ``AppState``."""

from collections.abc import Sequence
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from . import (
    adapters,
    chat,
    completions,
    embeddings,
    errors,
    health,
    models,
    tenants,
    tokenize,
    usage,
)
from .caller import Authenticate
from .observe import Observe
from .openapi import document
from .request_id import HEADER, RequestId
from .security import BodyLimit
from .sse import ClientGone, answer_gone_client
from .state import AppState


def create_app(state: AppState, cors_origins: Sequence[str] = ()) -> FastAPI:
    """The HTTP application; the interactive pages, which load scripts from elsewhere, are off.

    Args:
        state: What the routes work with.
        cors_origins: Origins whose web pages may call it, ``*`` for any.
    """
    app = FastAPI(title="deltamux", version=version("deltamux"), docs_url=None, redoc_url=None)
    app.state.api = state
    errors.install(app)
    app.add_exception_handler(ClientGone, answer_gone_client)
    app.add_middleware(
        BodyLimit,
        max_bytes=state.limits.max_body_bytes,
        max_upload_bytes=state.limits.max_upload_bytes,
    )
    app.add_middleware(Authenticate, tenants=state.tenants)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER],
        )
    app.add_middleware(Observe, metrics=state.metrics, tracer=state.tracer)
    app.add_middleware(RequestId)
    served = (completions, chat, embeddings, models, tokenize, adapters, tenants, usage, health)
    for module in served:
        app.include_router(module.router)
    document(app)
    return app
