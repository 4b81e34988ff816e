"""What the running engine knows of the store: contents it was told of, where they are, pins.

The engine learns of a content when it is first needed. An engine that is started after another
knows none, and is told at once only of those that are pinned.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Set
from itertools import count
from typing import Protocol

from ...adapters.errors import AdapterError
from ..engine.errors import EngineError
from ..engine.messages import AdapterInfo, HostChanges
from .backoff import Backoff
from .entries import Version
from .errors import AdapterUnavailable
from .names import plain_name

logger = logging.getLogger(__name__)

OnInfo = Callable[[str, AdapterInfo], None]


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

    def pin_adapter(self, adapter_id: int, pinned: bool) -> None:
        """Keep a loaded adapter in memory while no request uses it, or stop to."""
        ...


class Residents:
    """Contents in the engine, by digest; belongs to the event loop's thread.

    Args:
        engine: The engine.
        on_info: Told what the engine found in a content, before those who wait for it are.
    """

    def __init__(self, engine: AdapterPort, on_info: OnInfo) -> None:
        """Start with an engine that knows none."""
        self._engine = engine
        self._on_info = on_info
        self._numbers = count(1)
        self._ids: dict[str, int] = {}
        self._digests: dict[int, str] = {}
        self._loads: dict[str, asyncio.Task[AdapterInfo]] = {}
        self._pinned: dict[str, Version] = {}
        self._on_host: set[int] = set()
        self._backoff = Backoff()

    def adapter_id(self, digest: str) -> int:
        """What the engine calls a content; it never calls another the same."""
        if digest not in self._ids:
            number = self._ids[digest] = next(self._numbers)
            self._digests[number] = digest
        return self._ids[digest]

    def load(self, digest: str, path: str) -> "asyncio.Task[AdapterInfo]":
        """The load of a content into the engine, begun or joined; done where the engine knows it.

        Await it shielded: it belongs to all who wait. It ends with AdapterError where the content
        is refused, and EngineError where the engine is not there.
        """
        load = self._loads.get(digest)
        if load is None:
            load = asyncio.create_task(self._load(digest, path), name=f"load-{digest[:12]}")
            self._loads[digest] = load
            loads = self._loads
            load.add_done_callback(lambda ended: _forget_failure(loads, digest, ended))
        return load

    async def admit(self, digest: str, path: str) -> AdapterInfo:
        """Have the engine look at a content that is to be registered, failed before or not.

        Raises:
            AdapterError: It is refused.
            EngineError: The engine is not there to load it.
        """
        self._backoff.clear(digest)
        return await asyncio.shield(self.load(digest, path))

    async def ensure(self, version: Version, name: str) -> int:
        """What the engine calls a version that a request needs, once it knows it.

        Raises:
            AdapterUnavailable: It cannot be loaded, now or a short while ago.
            EngineError: The engine is not there to load it.
        """
        digest = version.digest
        try:
            if digest not in self._loads:
                self._backoff.check(digest)
            await asyncio.shield(self.load(digest, version.path))
        except AdapterUnavailable as error:
            raise _cannot_be_loaded(name, error) from error
        except AdapterError as error:
            raise _cannot_be_loaded(name, self._backoff.unavailable(digest)) from error
        return self.adapter_id(digest)

    def failure(self, digest: str) -> str | None:
        """Why the content could not be loaded the last time, None where it could."""
        return self._backoff.reason(digest)

    async def drop(self, digest: str) -> None:
        """Return once nothing of the content is left in the engine."""
        load, number = self._loads.pop(digest, None), self._ids.pop(digest, None)
        self._pinned.pop(digest, None)
        self._backoff.clear(digest)
        if number is None:
            return
        del self._digests[number]
        if load is None:
            return
        if not load.done():
            load.cancel()  # which takes it back from the engine
            return
        try:
            await self._engine.unload_adapter(number)
        except EngineError:
            # The engine is gone and the content with it.
            return

    def pin(self, versions: Iterable[Version]) -> None:
        """Keep exactly these contents in the engine while it has room."""
        wanted = {version.digest: version for version in versions}
        for digest in self._pinned.keys() - wanted.keys():
            self._engine.pin_adapter(self.adapter_id(digest), False)
        added = [wanted[digest] for digest in wanted if digest not in self._pinned]
        self._pinned = wanted
        for version in added:
            load = self._loads.get(version.digest)
            if load is not None and load.done():
                self._engine.pin_adapter(self.adapter_id(version.digest), True)
            else:
                self._load_pinned(version)

    def is_loading(self, digest: str) -> bool:
        """Whether the engine is being told of it."""
        load = self._loads.get(digest)
        return load is not None and not load.done()

    def is_on_host(self, digest: str) -> bool:
        """Whether it is in the engine's host memory."""
        return self._ids.get(digest) in self._on_host

    def is_in(self, digest: str, adapter_ids: Set[int]) -> bool:
        """Whether it is one of those that the engine calls so."""
        return self._ids.get(digest) in adapter_ids

    @property
    def num_on_host(self) -> int:
        """Contents in host memory, those that were dropped and are still there too."""
        return len(self._on_host)

    def digests_on_host(self) -> list[str]:
        """Of the contents in host memory."""
        return self.digests(self._on_host)

    def digests(self, adapter_ids: Iterable[int]) -> list[str]:
        """Contents that the engine calls so, save those that were dropped meanwhile."""
        return [self._digests[each] for each in sorted(adapter_ids) if each in self._digests]

    def host_changed(self, changes: HostChanges) -> None:
        """Take in what came to host memory and what left it."""
        self._on_host.update(changes.added)
        self._on_host.difference_update(changes.dropped)

    def engine_ready(self) -> None:
        """Another engine is there: have it keep what is pinned."""
        pinned, self._pinned = self._pinned, {}
        self.pin(pinned.values())

    def engine_down(self) -> None:
        """The engine ended, and what it knew with it."""
        self._loads = {}
        self._on_host = set()

    async def _load(self, digest: str, path: str) -> AdapterInfo:
        try:
            info = await self._engine.load_adapter(self.adapter_id(digest), path, digest)
        except AdapterError as error:
            self._backoff.failed(digest, f"{type(error).__name__}: {error}")
            raise
        self._backoff.clear(digest)
        if digest in self._pinned:
            self._engine.pin_adapter(self.adapter_id(digest), True)
        self._on_info(digest, info)
        return info

    def _load_pinned(self, version: Version) -> None:
        """Load what is pinned at its end; where the engine is down, the next one is asked."""

        def tell(load: "asyncio.Task[AdapterInfo]") -> None:
            error = None if load.cancelled() else load.exception()
            if isinstance(error, AdapterError):
                logger.error("a pinned adapter (%s) cannot be loaded: %s", version.source, error)

        self.load(version.digest, version.path).add_done_callback(tell)


def _cannot_be_loaded(name: str, error: AdapterUnavailable) -> AdapterUnavailable:
    return AdapterUnavailable(
        f"The adapter {plain_name(name)!r} cannot be loaded: {error}", error.retry_after
    )


def _forget_failure(
    loads: dict[str, "asyncio.Task[AdapterInfo]"], digest: str, ended: "asyncio.Task[AdapterInfo]"
) -> None:
    """A load that failed is begun anew by the next who asks."""
    failed = ended.cancelled() or ended.exception() is not None
    if failed and loads.get(digest) is ended:
        del loads[digest]
