"""What the HTTP process needs of the engine: the seam to ``server/engine/client.py``."""

from collections.abc import AsyncGenerator
from typing import Protocol

from ..engine.messages import EngineInfo, EngineStats
from ..generation import GenerationRequest, SequenceUpdate
from ..store.residents import AdapterPort


class EnginePort(AdapterPort, Protocol):
    """A running engine, as the API sees it."""

    @property
    def info(self) -> EngineInfo | None:
        """What runs; None until the engine is ready and while it is down."""
        ...

    @property
    def stats(self) -> EngineStats | None:
        """Of the last step; None while the engine is down."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceUpdate, None]:
        """Submit at the first iteration, then yield updates until one has a finish reason.

        Closing the generator aborts the sequence in the engine.

        Raises:
            EngineUnavailable: The engine is down; nothing was submitted.
            QueueFull: The queue is full; nothing was submitted.
            EngineDied: The engine died while this ran.
        """
        ...
