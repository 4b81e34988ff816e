"""Which adapters there are, under which names: the HTTP process's side of hot swap.

A name leads to one adapter id at a time, and an id never changes what it stands for. Replacing an
adapter gives its name to a new id; requests that began on the old id finish on it, and the engine
is told to forget it when the last of them has ended.
"""

import asyncio
import dataclasses
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from weakref import WeakValueDictionary

from ...adapters.errors import AdapterError
from ..composition import CompositionRefused, check_composition
from ..engine.errors import EngineError
from ..engine.messages import AdapterInfo
from ..generation import AdapterWeight
from .engine_port import AdapterPort

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class AdapterState(StrEnum):
    """Where an adapter stands."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class RegistryError(Exception):
    """A name that cannot be used as asked; the message says why."""


class NameRefused(RegistryError):
    """Not a name an adapter may have."""


class AlreadyLoaded(RegistryError):
    """The name is taken."""


class UnknownAdapter(RegistryError):
    """No adapter of that name."""


class StillLoading(RegistryError):
    """The adapter of that name is being loaded."""


class UnknownModel(RegistryError):
    """No base, adapter or version of that name is being served."""


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter under its name.

    Attributes:
        name: What requests call it.
        path: Its folder.
        adapter_id: What the engine calls it.
        state: Only a ready one is served.
        info: What the engine found in the folder, once ready.
        error: Why it is refused, once failed.
        created: Unix time of registration.
    """

    name: str
    path: str
    adapter_id: int
    state: AdapterState
    info: AdapterInfo | None = None
    error: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What a request runs on.

    Attributes:
        model: Its ``model`` field.
        adapters: Names and weights of its ``adapters`` field, empty without one.
    """

    model: str
    adapters: tuple[tuple[str, float], ...] = ()


class AdapterRegistry:
    """Names, ids and their use. Every method belongs to the event loop's thread."""

    def __init__(self, base_name: str, engine: AdapterPort) -> None:
        """Start with the base model alone."""
        self.base_name = base_name
        self._engine = engine
        self._ids = count(1)
        self._entries: dict[str, AdapterEntry] = {}
        self._retired: set[int] = set()
        self._leases: Counter[int] = Counter()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._unloading: set[asyncio.Task[None]] = set()

    async def load(self, name: str, path: str, replace: bool = False) -> AdapterEntry:
        """Serve the folder at ``path`` as ``name``; on any error nothing has changed.

        Args:
            name: 1 to 128 of ``A-Z a-z 0-9 . _ -``, not starting with a dot.
            path: The adapter's folder.
            replace: Take the name from the adapter that has it, once the new one is ready.

        Raises:
            NameRefused: The name is malformed or the base's.
            AlreadyLoaded: The name is taken and ``replace`` is not set.
            AdapterError: The engine refuses the adapter.
            EngineError: The engine is down.
        """
        self._check_name(name)
        async with self._lock(name):
            old = self._entries.get(name)
            if old is not None and old.state is AdapterState.READY and not replace:
                raise AlreadyLoaded(f"The adapter {name!r} is loaded already.")
            entry = await self._load(name, path, old)
            if old is not None and old.state is AdapterState.READY:
                await self._retire(old.adapter_id)
            return entry

    async def register(self, name: str, path: str) -> AdapterEntry:
        """Like ``load``, but a refused name or adapter is listed as failed with its reason."""
        try:
            return await self.load(name, path)
        except (AdapterError, NameRefused) as error:
            failed = AdapterEntry(
                name, path, next(self._ids), AdapterState.FAILED, error=str(error)
            )
            self._entries[name] = failed
            return failed

    def lose(self, adapter_id: int, error: AdapterError) -> None:
        """List the adapter as failed: a restarted engine refuses the files it had accepted."""
        for entry in self._entries.values():
            if entry.adapter_id == adapter_id:
                self._entries[entry.name] = dataclasses.replace(
                    entry, state=AdapterState.FAILED, info=None, error=str(error)
                )
                return

    async def unload(self, name: str) -> AdapterEntry:
        """Stop serving ``name`` at once; its memory is freed when its last request has ended.

        Raises:
            UnknownAdapter: There is none of that name.
        """
        async with self._lock(name):
            entry = self.get(name)
            del self._entries[name]
            if entry.state is AdapterState.READY:
                await self._retire(entry.adapter_id)
            return entry

    def get(self, name: str) -> AdapterEntry:
        """The adapter of that name.

        Raises:
            UnknownAdapter: There is none.
        """
        if name not in self._entries:
            raise UnknownAdapter(f"The adapter {name!r} cannot be found.")
        return self._entries[name]

    def entries(self) -> list[AdapterEntry]:
        """All adapters by name, failed and loading ones too."""
        return [self._entries[name] for name in sorted(self._entries)]

    def names(self, adapter_ids: list[int]) -> list[str]:
        """Names of those of the ids that have one."""
        wanted = set(adapter_ids)
        return [entry.name for entry in self.entries() if entry.adapter_id in wanted]

    def resolve(self, model: str) -> AdapterEntry | None:
        """The adapter a request's ``model`` means; None for the bare base.

        Forms: the base's name, ``adapter``, ``base:adapter``, either with ``@`` and the beginning
        of the adapter's digest.

        Raises:
            UnknownModel: Nothing has that name and version, or it was refused.
            StillLoading: It will be there soon.
        """
        if model == self.base_name:
            return None
        name, at, version = model.removeprefix(f"{self.base_name}:").partition("@")
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownModel(f"The model {model!r} does not exist.")
        if entry.state is AdapterState.LOADING:
            raise StillLoading(f"The adapter {name!r} is being loaded; try again shortly.")
        if entry.info is None:
            raise UnknownModel(f"The adapter {name!r} is not served: {entry.error}")
        digest = entry.info.digest.removeprefix("sha256:")
        if at and not (version and digest.startswith(version)):
            raise UnknownModel(
                f"The model {model!r} does not exist: {name!r} is loaded as version {digest[:12]}."
            )
        return entry

    def select(self, choice: ModelChoice) -> list[tuple[AdapterEntry, float]]:
        """The adapters a request means, with their weights; none for the bare base.

        Raises:
            UnknownModel: As ``resolve``; or the base where an adapter belongs, or an adapter where
                the base does.
            StillLoading: As ``resolve``.
            CompositionRefused: The adapters cannot be combined.
        """
        alone = self.resolve(choice.model)
        if not choice.adapters:
            return [] if alone is None else [(alone, 1.0)]
        if alone is not None:
            raise CompositionRefused(
                f"with 'adapters', 'model' names the base, {self.base_name!r}, and not an adapter"
            )
        selected = [(self._adapter(name), weight) for name, weight in choice.adapters]
        if len({entry.adapter_id for entry, _ in selected}) < len(selected):
            raise CompositionRefused("'adapters' names one adapter twice: add up its weights")
        check_composition(
            [
                (repr(entry.name), weight, entry.info.composable)
                for entry, weight in selected
                if entry.info is not None
            ]
        )
        return selected

    @contextmanager
    def lease(self, choice: ModelChoice) -> Iterator[list[AdapterWeight]]:
        """The adapters a request means, kept in the engine while the block runs.

        Raises:
            UnknownModel: As ``select``.
            CompositionRefused: As ``select``.
        """
        leased = [AdapterWeight(entry.adapter_id, weight) for entry, weight in self.select(choice)]
        self._leases.update(each.adapter_id for each in leased)
        try:
            yield leased
        finally:
            for each in leased:
                self._release(each.adapter_id)

    def _adapter(self, model: str) -> AdapterEntry:
        entry = self.resolve(model)
        if entry is None:
            raise UnknownModel(f"{model!r} is the base model; 'adapters' names adapters.")
        return entry

    async def _load(self, name: str, path: str, old: AdapterEntry | None) -> AdapterEntry:
        entry = AdapterEntry(name, path, next(self._ids), AdapterState.LOADING)
        if old is None:
            self._entries[name] = entry
        try:
            info = await self._engine.load_adapter(entry.adapter_id, path, None)
        except BaseException:
            if old is None:
                del self._entries[name]
            raise
        ready = AdapterEntry(
            name, path, entry.adapter_id, AdapterState.READY, info, created=entry.created
        )
        self._entries[name] = ready
        return ready

    async def _retire(self, adapter_id: int) -> None:
        if self._leases[adapter_id]:
            self._retired.add(adapter_id)
        else:
            await self._unload(adapter_id)

    def _release(self, adapter_id: int) -> None:
        self._leases[adapter_id] -= 1
        if self._leases[adapter_id]:
            return
        del self._leases[adapter_id]
        if adapter_id in self._retired:
            self._retired.remove(adapter_id)
            task = asyncio.get_running_loop().create_task(self._unload(adapter_id))
            self._unloading.add(task)
            task.add_done_callback(self._unloading.discard)

    async def _unload(self, adapter_id: int) -> None:
        try:
            await self._engine.unload_adapter(adapter_id)
        except EngineError:
            # The engine is gone and the adapter with it.
            return

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise NameRefused(
                f"{name!r} is no adapter name: use 1 to 128 letters, digits, '.', '_' or '-', "
                "not starting with '.'."
            )
        if name == self.base_name:
            raise NameRefused(f"{name!r} is the name of the base model.")

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())
