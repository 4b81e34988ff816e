"""What the HTTP process needs of the engine: the seam to ``server/engine/client.py``."""

from collections.abc import AsyncGenerator
from typing import Protocol

from ..engine.messages import AdapterInfo, EngineInfo, EngineStats
from ..generation import GenerationRequest, SequenceUpdate


class AdapterPort(Protocol):
    """Loading and unloading of adapters."""

    async def load_adapter(self, adapter_id: int, path: str, digest: str | None) -> AdapterInfo:
        """Bring the adapter into host memory.

        Raises:
            AdapterError: It is refused.
            EngineError: The engine is not there to load it.
        """
        ...

    async def unload_adapter(self, adapter_id: int) -> None:
        """Return once nothing of the adapter is left in the engine.

        Raises:
            EngineError: The engine is not there, and with it the adapter.
        """
        ...


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
