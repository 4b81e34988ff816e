"""Adapters on their way into the store: equal fetches joined, contents kept from being collected.

Everything that takes time runs in worker threads; what decides runs on the event loop.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import BinaryIO
from uuid import uuid4
from weakref import WeakValueDictionary

from .budget import DiskBudget
from .contents import ContentStore
from .errors import DigestMismatch, FetchFailed
from .intake import Intake, Staged
from .sources import Source, SourceKind

_FETCH_THREAD = "adapter-fetch"
_LAST_FETCH_SECONDS = 1.0

_FETCHES = 8
"""Sources that are read at once; in threads of their own, so that nothing else waits for one."""


def fetches_ended() -> bool:
    """Whether no thread reads a source any more, after a short wait for those that are about to."""
    deadline = time.monotonic() + _LAST_FETCH_SECONDS
    threads = [each for each in threading.enumerate() if each.name.startswith(_FETCH_THREAD)]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


class Arrivals:
    """Brings contents into the store and takes them out; belongs to the event loop's thread.

    Args:
        intake: How a source is brought here.
        is_needed: Whether any version has a content; asked before one is removed.
        release: Takes a content that is to be removed out of memory.
        budget: Of the disk.
        known: Contents that any version has.
    """

    def __init__(
        self,
        intake: Intake,
        is_needed: Callable[[str], Awaitable[bool]],
        release: Callable[[str], Awaitable[None]],
        budget: DiskBudget,
        known: Callable[[], Awaitable[set[str]]],
    ) -> None:
        """Start with nothing on its way."""
        self._intake = intake
        self._is_needed = is_needed
        self._release = release
        self._budget = budget
        self._known = known
        self._threads = ThreadPoolExecutor(_FETCHES, thread_name_prefix=_FETCH_THREAD)
        self._fetches: dict[str, asyncio.Future[Staged]] = {}
        self._under_way: set[asyncio.Future[Staged]] = set()
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
            begun = self._fetches[key] = loop.run_in_executor(self._threads, stage)
            self._under_way.add(begun)
            begun.add_done_callback(self._under_way.discard)
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
                self._budget.release(digest)

    def close(self) -> None:
        """Begin no more fetches, and give up those that run: their threads go on for nobody."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for fetch in list(self._under_way):
            fetch.cancel()

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
            await self._reserve(staged)
            try:
                folder = await asyncio.to_thread(self._contents.adopt, staged.folder, staged.digest)
            except OSError as error:
                self._budget.release(staged.digest)
                raise FetchFailed(f"{staged.source} cannot be kept: {error}") from error
        return replace(staged, folder=folder)

    async def _reserve(self, staged: Staged) -> None:
        """Count a content, collecting others that nothing needs if there is no room.

        Raises:
            StoreFull: There is none all the same.
        """
        if not self._budget.has_room(staged.digest, staged.file_bytes):
            unneeded = self._budget.digests - await self._known() - self._arriving.keys()
            for digest in unneeded:
                await self.collect(digest)
        self._budget.reserve(staged.digest, staged.file_bytes)

    def _discard(self, task: "asyncio.Future[Staged]") -> None:
        """Remove what was staged and not adopted; it is small work, renamed away or not there."""
        if not task.cancelled() and task.exception() is None and task.result().copied:
            asyncio.get_running_loop().run_in_executor(
                None, self._contents.discard, task.result().folder
            )

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())
