"""Adapters that options of the command line declare: ``--adapter`` and watched folders.

What an option declares is registered for as long as a start has the option. Files that have not
changed since they were last registered are not read again, so a version that was gone back to stays
the default.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from watchfiles import awatch

from ...adapters.errors import AdapterError
from ...adapters.files import is_adapter_folder
from ..engine.errors import EngineError
from .entries import Adapter
from .errors import RegistryError
from .intake import fingerprint
from .registry import AdapterRegistry
from .sources import SourceKind, parse_source
from .wanted import Wanted

logger = logging.getLogger(__name__)

_AT_ONCE = 8
"""Adapters of a folder that are registered at the same time."""


class DeclaredRefused(Exception):
    """An adapter that was named on the command line cannot be served."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What the command line declares.

    Attributes:
        named: Name and source of single adapters, each of which must be good.
        folders: Folders whose adapters are served under their folders' names.
    """

    named: Sequence[tuple[str, str]] = ()
    folders: Sequence[Path] = ()

    @property
    def origins(self) -> frozenset[str]:
        """What adapters that are declared here have as their origin."""
        named = (_named_origin(name) for name, _ in self.named)
        return frozenset({*named, *map(_folder_origin, self.folders)})


class DeclaredAdapters:
    """Keeps the registry up to date with what is declared; belongs to the event loop's thread."""

    def __init__(self, declared: Declared, registry: AdapterRegistry) -> None:
        """Look at nothing yet."""
        self._declared = declared
        self._registry = registry
        self._folders = [FolderSync(folder, registry) for folder in declared.folders]

    async def register(self) -> None:
        """Register all that is declared.

        Raises:
            DeclaredRefused: One that is named alone is refused.
            EngineError: The engine is down.
        """
        for name, source in self._declared.named:
            origin = _named_origin(name)
            try:
                if not _is_as_declared(self._registry.catalog.find(name), source, origin):
                    await self._registry.add(Wanted(name, source, replace=True, origin=origin))
            except (AdapterError, RegistryError) as error:
                raise DeclaredRefused(f"--adapter {name}={source}: {error}") from error
        for folder in self._folders:
            await folder.sync()

    async def watch(self) -> None:
        """Take in what is added to the folders, changed and removed, until cancelled."""
        polling = None
        while self._folders:
            try:
                async for _ in awatch(*self._declared.folders, force_polling=polling):
                    await self._sync_all()
            except OSError as error:
                logger.warning("adapter folders are polled instead of watched: %s", error)
                polling = True

    async def _sync_all(self) -> None:
        for folder in self._folders:
            try:
                await folder.sync()
            except (EngineError, OSError) as error:
                logger.warning("%s is looked at when it changes again: %s", folder.folder, error)


class FolderSync:
    """Brings the registry up to date with one folder."""

    def __init__(self, folder: Path, registry: AdapterRegistry) -> None:
        """Look at nothing yet."""
        self.folder = folder
        self._origin = _folder_origin(folder)
        self._registry = registry
        self._tried: dict[str, str] = {}
        self._one_at_a_time = asyncio.Lock()

    async def sync(self) -> None:
        """Register what is new or changed since it was registered, remove what is not there.

        Raises:
            EngineError: The engine is down.
            OSError: The folder cannot be read.
        """
        async with self._one_at_a_time:
            found = await asyncio.to_thread(_adapters_in, self.folder)
            await self._remove_all_but({path.name for path, _ in found})
            turns = asyncio.Semaphore(_AT_ONCE)
            news = [(path, state) for path, state in found if self._is_news(path, state)]
            await asyncio.gather(*(self._take(path, state, turns) for path, state in news))

    def _is_news(self, path: Path, state: str) -> bool:
        """Whether the files differ from what is registered, and from what was last tried."""
        known = self._registry.catalog.find(path.name)
        if self._tried.get(path.name) == state:
            return False
        if known is None:
            return True
        if known.origin != self._origin:
            self._tried[path.name] = state
            logger.warning("the adapter at %s is not served: its name is taken", path)
            return False
        return not _has_version(known, str(path), state)

    async def _take(self, path: Path, state: str, turns: asyncio.Semaphore) -> None:
        wanted = Wanted(path.name, str(path), replace=True, origin=self._origin)
        async with turns:
            adapter = await self._registry.register(wanted)
        self._tried[path.name] = state
        error = self._registry.error(adapter)
        if error is not None:
            logger.warning("adapter %s is not served from %s: %s", adapter.name, path, error)

    async def _remove_all_but(self, present: set[str]) -> None:
        known = [each for each in self._registry.catalog.all() if each.origin == self._origin]
        for adapter in known:
            if adapter.name not in present:
                logger.info("adapter %s is removed: it is gone from %s", adapter.name, self.folder)
                self._tried.pop(adapter.name, None)
                await self._registry.remove(adapter.name)


def _adapters_in(folder: Path) -> list[tuple[Path, str]]:
    """Adapter folders directly inside, and fingerprints of their files."""
    inside = sorted(path for path in folder.iterdir() if is_adapter_folder(path))
    return [(path, fingerprint(path)) for path in inside]


def _is_as_declared(known: Adapter | None, source: str, origin: str) -> bool:
    """Whether the adapter was last registered from this source, as it is now.

    Its default may be another version meanwhile. What was registered from elsewhere, by an earlier
    start or by the API, gives way to what this start declares.
    """
    if known is None or known.origin != origin or known.default is None:
        return False
    place = parse_source(source)
    if place.kind is not SourceKind.LOCAL:
        return known.source == source or known.source.startswith(f"{source}@")
    return known.source == place.text and _has_version(known, place.text, fingerprint(place.path))


def _has_version(known: Adapter, source: str, state: str) -> bool:
    """Whether one was registered from the source when its files had this fingerprint."""
    return any((each.source, each.fingerprint) == (source, state) for each in known.versions)


def _named_origin(name: str) -> str:
    return f"--adapter {name}"


def _folder_origin(folder: Path) -> str:
    return str(folder.resolve())
