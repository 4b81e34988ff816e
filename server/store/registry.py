"""The registry of adapters: names and their versions, durable before they are acknowledged.

A name leads to one default version at a time. Loading changed files under a name makes a new
version of it; requests that began on an old one finish on it. The newest few versions of a name are
kept to go back to, others are collected once no request runs on them.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from time import time
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from ...adapters.errors import AdapterError
from ..composition import Room
from ..engine.errors import EngineError
from ..engine.messages import AdapterInfo
from ..tenants.tenant import TenantLimits
from .arrivals import Arrivals
from .backoff import Backoff
from .budget import DiskBudget
from .catalog import Catalog
from .entries import Adapter, Usage, Version
from .errors import AlreadyLoaded, QuotaExceeded, RegistryError, VersionRefused
from .intake import Intake, Staged
from .leases import Leases, ModelChoice
from .names import check_name, full_name
from .pins import check_pins
from .quota import check_quota
from .records import Records
from .residents import AdapterPort, Residents
from .sources import parse_source
from .wanted import Wanted

logger = logging.getLogger(__name__)

_USAGE_SECONDS = 10.0


class AdapterRegistry:
    """Registers, changes and removes adapters; belongs to the event loop's thread.

    Args:
        base_name: The served name of the base.
        engine: Where adapters are tried and loaded.
        records: The database.
        intake: How adapters come here.
        keep_versions: Versions of a name that are kept, the default one included.
        store_budget: Bytes of the disk that copies may take; None for any number.
    """

    def __init__(
        self,
        base_name: str,
        engine: AdapterPort,
        records: Records,
        intake: Intake,
        keep_versions: int,
        store_budget: int | None = None,
    ) -> None:
        """Start with the base alone; ``open`` reads what was registered before."""
        self._records = records
        self._intake = intake
        self._keep = keep_versions
        self._fetch_failures = Backoff()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetching: set[str] = set()
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self.catalog = Catalog(base_name)
        self.residents = Residents(engine, self._note_info)
        self._budget = DiskBudget(store_budget)
        self._arrivals = Arrivals(
            intake, self._is_needed, self.residents.drop, self._budget, self._known
        )
        self.leases = Leases(self.catalog, self.residents, self._collect_later)

    async def open(self, origins: frozenset[str] = frozenset()) -> None:
        """Read what was registered, and remove what killed servers left behind.

        Args:
            origins: What may keep adapters registered beside the API. Those of other origins are
                left alone until a start has them again.
        """
        for adapter, usage in await asyncio.to_thread(self._records.load):
            if adapter.origin in origins | {""}:
                self.catalog.put(adapter)
                self.leases.usage[adapter.name] = usage
        swept = await asyncio.to_thread(self._intake.contents.sweep, await self._known())
        self._budget.count(await asyncio.to_thread(self._records.copies))
        if swept:
            logger.warning("removed %d contents that no adapter has", len(swept))
        self.residents.pin(self.catalog.pinned())

    async def close(self) -> None:
        """End what runs in the background, and write what is not written yet."""
        self._arrivals.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._write_usage()
        await asyncio.to_thread(self._intake.contents.clear_staging)

    async def add(self, wanted: Wanted) -> Adapter:
        """Serve the adapter of a source under a name; on any error nothing has changed.

        Raises:
            RegistryError: The name, the source or the files are refused.
            AdapterError: The engine refuses the adapter.
            EngineError: The engine is down.
        """
        source = parse_source(wanted.source)
        return await self._add(wanted, self._arrivals.fetched(source, wanted.expected))

    async def add_archive(self, wanted: Wanted, archive: BinaryIO) -> Adapter:
        """Like ``add``, for the adapter in an archive.

        Raises:
            RegistryError: The name or the archive is refused.
            AdapterError: The engine refuses the adapter.
            EngineError: The engine is down.
        """
        return await self._add(wanted, self._arrivals.unpacked(archive, wanted.expected))

    async def promise(self, wanted: Wanted) -> Adapter:
        """Register a name now and fetch its adapter in the background, or when it is asked for.

        Raises:
            RegistryError: The name or the source is refused.
        """
        check_name(wanted.name, self.catalog.base_name, wanted.owner)
        source = parse_source(wanted.source).text
        async with self._lock(wanted.full_name):
            self._require_free(wanted)
            adapter = self._new(replace(wanted, source=source))
            await self._put(adapter)
        self._spawn(self._fetch(adapter.name))
        return adapter

    async def register(self, wanted: Wanted) -> Adapter:
        """Like ``add``, but an adapter that cannot be had is listed as failed with its reason.

        Raises:
            EngineError: The engine is down.
        """
        try:
            return await self.add(wanted)
        except (AdapterError, RegistryError) as error:
            self._fetch_failures.failed(wanted.full_name, str(error))
            async with self._lock(wanted.full_name):
                known = self.catalog.find(wanted.full_name)
                if known is None:
                    known = self._new(wanted)
                    # Not written: the option that declares it does so again at the next start.
                    self.catalog.put(known)
                return known

    async def prepare(self, choice: ModelChoice) -> None:
        """Fetch the adapters that a request means and that have no version yet.

        Raises:
            UnknownModel: As ``Leases.chosen``.
            AdapterUnavailable: One cannot be had, now or a short while ago.
            EngineError: The engine is down.
        """
        for chosen, _ in self.leases.chosen(choice):
            if chosen.version is None:
                await self._fetch(chosen.adapter.name)

    async def remove(self, name: str) -> Adapter:
        """Stop serving ``name`` at once; its memory is freed when its last request has ended.

        Raises:
            UnknownAdapter: There is none of that name.
        """
        async with self._lock(name):
            self.catalog.get(name)
            await asyncio.to_thread(self._records.delete, name)
            adapter = self.catalog.remove(name)
            self.residents.pin(self.catalog.pinned())
            self.leases.usage.pop(name, None)
            self.leases.used.discard(name)
            self._fetch_failures.clear(name)
        for version in adapter.versions:
            await self._arrivals.collect(version.digest)
        return adapter

    async def set_default(self, name: str, digest: str | None) -> Adapter:
        """Make the version whose digest begins like this the default; None: the one before it.

        It is brought to memory first, so that no request waits for it.

        Raises:
            UnknownAdapter: There is no such adapter.
            VersionRefused: There is no such version.
            AdapterUnavailable: The version cannot be loaded.
            EngineError: The engine is down.
        """
        async with self._lock(name):
            adapter = self.catalog.get(name)
            version = adapter.earlier() if digest is None else adapter.version(digest)
            if version is None:
                which = "earlier version" if digest is None else f"version {digest!r}"
                raise VersionRefused(f"The adapter {adapter.plain_name!r} has no {which}.")
            await self.residents.ensure(version, name)
            return await self._put(replace(adapter, default_digest=version.digest))

    async def set_pinned(self, name: str, pinned: bool, room: Room) -> Adapter:
        """Keep the adapter's default version in memory, in the room for pinned ones, or not.

        Raises:
            UnknownAdapter: There is no such adapter.
            PinRefused: Pinned adapters would leave too little room for others.
        """
        async with self._lock(name):
            adapter = replace(self.catalog.get(name), pinned=pinned)
            if pinned:
                check_pins(adapter, self.catalog.pinned(), room)
            return await self._put(adapter)

    @property
    def store_bytes(self) -> int:
        """Disk that the store's own copies take."""
        return self._budget.taken

    def error(self, adapter: Adapter) -> str | None:
        """Why the adapter could not be fetched or loaded the last time, None where it could."""
        fetch = self._fetch_failures.reason(adapter.name)
        default = adapter.default_digest
        return fetch or (None if default is None else self.residents.failure(default))

    def is_fetching(self, name: str) -> bool:
        """Whether files for the name are on their way."""
        return name in self._fetching

    async def write_usage(self) -> None:
        """Write hits and times of use now and then, until cancelled."""
        while True:
            await asyncio.sleep(_USAGE_SECONDS)
            await self._write_usage()

    async def _add(self, wanted: Wanted, arriving: AbstractAsyncContextManager[Staged]) -> Adapter:
        check_name(wanted.name, self.catalog.base_name, wanted.owner)
        async with self._lock(wanted.full_name):
            self._require_free(wanted)
            self._fetching.add(wanted.full_name)
            try:
                async with arriving as staged:
                    return await self._admit(wanted, staged)
            finally:
                self._fetching.discard(wanted.full_name)

    async def _admit(self, wanted: Wanted, staged: Staged) -> Adapter:
        """Have the engine look at what arrived, and make it the default version of the name."""
        try:
            info = await self.residents.admit(staged.digest, str(staged.folder))
        except BaseException:
            self._collect_later(staged.digest)
            raise
        adapter = self.catalog.find(wanted.full_name) or self._new(wanted)
        adapter = adapter.with_version(_version(staged, info), self._keep)
        if wanted.origin:
            adapter = replace(adapter, origin=wanted.origin)
        self._fetch_failures.clear(wanted.full_name)
        if wanted.owner is None:
            return await self._put(adapter)
        return await self._put_own(adapter, wanted.owner, wanted.limits)

    async def _put_own(self, adapter: Adapter, owner: str, limits: TenantLimits) -> Adapter:
        """One at a time for each owner, so that several together stay within its limits."""
        async with self._lock(full_name("", owner)):
            try:
                check_quota(adapter, self.catalog.owned(owner), limits)
            except QuotaExceeded:
                self._collect_later(adapter.versions[0].digest)
                raise
            return await self._put(adapter)

    async def _put(self, adapter: Adapter) -> Adapter:
        """Write the adapter, then let requests see it."""
        old = self.catalog.find(adapter.name)
        await asyncio.shield(self._write(adapter))
        for version in () if old is None else old.versions:
            if all(version.digest != kept.digest for kept in adapter.versions):
                await self._arrivals.collect(version.digest)
        return adapter

    async def _write(self, adapter: Adapter) -> None:
        # Not to be interrupted in between: a client that goes away leaves both or neither.
        await asyncio.to_thread(self._records.put, adapter)
        self.catalog.put(adapter)
        self.residents.pin(self.catalog.pinned())

    async def _fetch(self, name: str) -> None:
        """Fetch a registered adapter that has no version; all who ask for it wait for one fetch."""
        if name not in self._fetches:
            self._fetch_failures.check(name)
            task = self._fetches[name] = self._spawn(self._fetch_once(name))
            task.add_done_callback(lambda _: self._fetches.pop(name))
        await asyncio.shield(self._fetches[name])

    async def _fetch_once(self, name: str) -> None:
        adapter = self.catalog.get(name)
        try:
            await self.add(
                Wanted(
                    adapter.plain_name,
                    adapter.source,
                    expected=adapter.expected,
                    origin=adapter.origin,
                    owner=adapter.owner,
                )
            )
        except AlreadyLoaded:
            return  # somebody registered another meanwhile
        except (AdapterError, RegistryError) as error:
            logger.warning("adapter %s cannot be had: %s", name, error)
            self._fetch_failures.failed(
                name, f"The adapter {adapter.plain_name!r} cannot be loaded: {error}"
            )
            raise self._fetch_failures.unavailable(name) from error

    def _note_info(self, digest: str, info: AdapterInfo) -> None:
        """Keep what the engine found, which depends on the base and on how it is computed."""
        for adapter in self.catalog.with_content(digest):
            if any(each.digest == digest and each.info != info for each in adapter.versions):
                self._spawn(self._put_info(adapter.name, digest, info))

    async def _put_info(self, name: str, digest: str, info: AdapterInfo) -> None:
        async with self._lock(name):
            adapter = self.catalog.find(name)
            if adapter is not None:
                await self._put(adapter.with_info(digest, info))

    async def _is_needed(self, digest: str) -> bool:
        held = self.leases.is_held(digest)
        return held or await asyncio.to_thread(self._records.has_content, digest)

    async def _known(self) -> set[str]:
        return await asyncio.to_thread(self._records.digests)

    def _collect_later(self, digest: str) -> None:
        if not self.catalog.with_content(digest):
            self._spawn(self._arrivals.collect(digest))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, RegistryError | EngineError):
            logger.error("work on the registry failed", exc_info=error)

    async def _write_usage(self) -> None:
        used, self.leases.used = self.leases.used, set()
        usages: dict[str, Usage] = {name: self.leases.usage[name] for name in used}
        if usages:
            await asyncio.to_thread(self._records.note_usage, usages)

    def _require_free(self, wanted: Wanted) -> None:
        known = self.catalog.find(wanted.full_name)
        if known is not None and known.default is not None and not wanted.replace:
            raise AlreadyLoaded(f"The adapter {wanted.name!r} is loaded already.")

    def _new(self, wanted: Wanted) -> Adapter:
        return Adapter(
            name=wanted.full_name,
            source=wanted.source,
            origin=wanted.origin,
            created=int(time()),
            expected=wanted.expected,
            owner=wanted.owner,
        )

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _version(staged: Staged, info: AdapterInfo) -> Version:
    return Version(
        digest=staged.digest,
        source=staged.source,
        fingerprint=staged.fingerprint,
        path=str(staged.folder),
        copied=staged.copied,
        file_bytes=staged.file_bytes,
        info=info,
        registered=time(),
    )
