"""Adapters on their way into the store: equal fetches joined, contents kept from being collected.

Everything that takes time runs in worker threads; what decides runs on the event loop.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import BinaryIO
from uuid import uuid4
from weakref import WeakValueDictionary

from .contents import ContentStore
from .errors import DigestMismatch
from .intake import Intake, Staged
from .sources import Source, SourceKind

_FETCHES = 8
"""Sources that are read at once; in threads of their own, so that nothing else waits for one."""


class Arrivals:
    """Brings contents into the store and takes them out; belongs to the event loop's thread.

    Args:
        intake: How a source is brought here.
        is_needed: Whether any version has a content; asked before one is removed.
        release: Takes a content that is to be removed out of memory.
    """

    def __init__(
        self,
        intake: Intake,
        is_needed: Callable[[str], Awaitable[bool]],
        release: Callable[[str], Awaitable[None]],
    ) -> None:
        """Start with nothing on its way."""
        self._intake = intake
        self._is_needed = is_needed
        self._release = release
        self._threads = ThreadPoolExecutor(_FETCHES, thread_name_prefix="adapter-fetch")
        self._fetches: dict[str, asyncio.Future[Staged]] = {}
        self._users: Counter[str] = Counter()
        self._arriving: Counter[str] = Counter()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def _contents(self) -> ContentStore:
        return self._intake.contents

    def fetched(self, source: Source, expected: str | None) -> AbstractAsyncContextManager[Staged]:
        """The adapter at a source, in the store while the block runs and for good if it is used.

        Entering raises RegistryError where the source does not give it, or gives another than is
        ``expected``, and AdapterError where its files are refused.
        """

        def stage() -> Staged:
            return self._intake.stage(source)

        # A local folder may have changed since another fetch of it began.
        key = str(uuid4()) if source.kind is SourceKind.LOCAL else source.text
        return self._arriving_from(key, stage, expected)

    def unpacked(
        self, archive: BinaryIO, expected: str | None
    ) -> AbstractAsyncContextManager[Staged]:
        """Like ``fetched``, for the adapter in an archive that was uploaded."""

        def stage() -> Staged:
            return self._intake.stage_archive(archive)

        return self._arriving_from(str(uuid4()), stage, expected)

    @asynccontextmanager
    async def _arriving_from(
        self, key: str, stage: Callable[[], Staged], expected: str | None
    ) -> AsyncIterator[Staged]:
        if key not in self._fetches:
            loop = asyncio.get_running_loop()
            self._fetches[key] = loop.run_in_executor(self._threads, stage)
        task = self._fetches[key]
        self._users[key] += 1
        try:
            staged = await asyncio.shield(task)
            async with self._kept(staged, expected) as kept:
                yield kept
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._fetches[key]
                # A fetch that nobody waits for any more ends by itself; so does what it staged.
                task.add_done_callback(self._discard)

    async def collect(self, digest: str) -> None:
        """Free a content that no version has, in memory and on disk."""
        async with self._lock(digest):
            if not self._arriving[digest] and not await self._is_needed(digest):
                await self._release(digest)
                await asyncio.to_thread(self._contents.remove, digest)

    def close(self) -> None:
        """Begin no more fetches."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _kept(self, staged: Staged, expected: str | None) -> AsyncIterator[Staged]:
        if expected is not None and staged.digest != expected:
            raise DigestMismatch(
                f"{staged.source} holds the adapter {staged.digest}, not {expected} as required"
            )
        self._arriving[staged.digest] += 1
        try:
            yield await self._adopted(staged)
        finally:
            self._arriving[staged.digest] -= 1
            if not self._arriving[staged.digest]:
                del self._arriving[staged.digest]

    async def _adopted(self, staged: Staged) -> Staged:
        # Whoever collects this content is let finish first.
        async with self._lock(staged.digest):
            if not staged.copied:
                return staged
            folder = await asyncio.to_thread(self._contents.adopt, staged.folder, staged.digest)
        return replace(staged, folder=folder)

    def _discard(self, task: "asyncio.Future[Staged]") -> None:
        """Remove what was staged and not adopted; it is small work, renamed away or not there."""
        if not task.cancelled() and task.exception() is None and task.result().copied:
            asyncio.get_running_loop().run_in_executor(
                None, self._contents.discard, task.result().folder
            )

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())
