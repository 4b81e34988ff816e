"""Puts the routes together; everything they work with comes in as ``AppState``."""

from importlib.metadata import version

from fastapi import FastAPI

from . import adapters, chat, completions, errors, health, models, tokenize
from .security import BodyLimit
from .sse import ClientGone, answer_gone_client
from .state import AppState


def create_app(state: AppState) -> FastAPI:
    """The HTTP application; the interactive pages, which load scripts from elsewhere, are off."""
    app = FastAPI(title="deltamux", version=version("deltamux"), docs_url=None, redoc_url=None)
    app.state.api = state
    errors.install(app)
    app.add_exception_handler(ClientGone, answer_gone_client)
    app.add_middleware(
        BodyLimit,
        max_bytes=state.limits.max_body_bytes,
        max_upload_bytes=state.limits.max_upload_bytes,
    )
    for module in (completions, chat, models, tokenize, adapters, health):
        app.include_router(module.router)
    return app
