"""What the routes work with, made once by the command line and handed to ``create_app``."""

import asyncio
from dataclasses import dataclass, field
from time import time
from typing import Annotated, cast

from fastapi import Depends, Request

from ..engine.errors import EngineUnavailable
from ..engine.messages import EngineInfo
from ..grammar.check import GrammarCheck
from ..metrics.metrics import Metrics
from ..store.registry import AdapterRegistry
from ..store.sources import SourcePolicy
from ..tenants.admin import TenantAdmin
from ..tenants.directory import TenantDirectory
from ..tenants.limits import TenantLimiter
from ..text.tokenizer import Tokenizer
from ..tools.formats import ToolFormat
from ..tracing import RequestTracer
from ..usage.ledger import Ledger
from .engine_port import EnginePort

_POLICY = SourcePolicy()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_body_bytes: Larger bodies are refused while they are read.
        max_upload_bytes: The same for uploaded archives.
        max_sequences: Prompts times choices of one request.
        inline_characters: Texts up to this length are tokenized on the event loop; longer ones
            would hold up other streams and go to a thread.
    """

    max_body_bytes: int = 16 * 2**20
    max_upload_bytes: int = 2 * 2**30
    max_sequences: int = 1024
    inline_characters: int = 4096


@dataclass(frozen=True, slots=True)
class AppState:
    """Everything a route needs.

    Attributes:
        engine: Where sequences run.
        tokenizer: Of the base model.
        registry: The adapters.
        metrics: What ``/metrics`` shows.
        ledger: What was used.
        check_grammar: Says whether the engine will take a grammar.
        tool_format: How the base writes tool calls; None if it was taught no format that is known.
        tenant_admin: Manages tenants.
        model_root: Where the base came from, for ``/v1/models``.
        limits: What one request may ask for.
        policy: Where callers may have adapters loaded from.
        tracer: Where traces of requests go; None for nowhere.
        limiter: How much they ask for.
        created: Unix time the server started.
        started: Set once the adapters named at start are loaded.
    """

    engine: EnginePort
    tokenizer: Tokenizer
    registry: AdapterRegistry
    metrics: Metrics
    ledger: Ledger
    check_grammar: GrammarCheck
    tool_format: ToolFormat | None
    tenant_admin: TenantAdmin
    model_root: str
    limits: Limits = Limits()
    policy: SourcePolicy = _POLICY
    tracer: RequestTracer | None = None
    limiter: TenantLimiter = field(default_factory=TenantLimiter)
    created: int = field(default_factory=lambda: int(time()))
    started: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def model_name(self) -> str:
        """The name the base is served under."""
        return self.registry.catalog.base_name

    @property
    def tenants(self) -> TenantDirectory:
        """Who may call."""
        return self.tenant_admin.directory

    def require_info(self) -> EngineInfo:
        """What the engine runs.

        Raises:
            EngineUnavailable: It is down.
        """
        if self.engine.info is None:
            raise EngineUnavailable("The engine is starting or restarting; try again shortly.")
        return self.engine.info


def _state_of(request: Request) -> AppState:
    return cast(AppState, request.app.state.api)


State = Annotated[AppState, Depends(_state_of)]
